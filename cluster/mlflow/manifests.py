"""MLflow's server on PostgreSQL and an object store, for Kubernetes.

The database exists already, or is rendered too; its URI, and of a rendered one the password, are in a Secret. Keys of
the object store stay with the server, which hands files on (`--artifacts-destination`).
"""

from typing import Any

from domainshuttle.cluster.kuberay.pods import UID, Manifest
from domainshuttle.cluster.spec import ClusterSpec, MlflowSection

PORT = 5000


def server_arguments(mlflow: MlflowSection, namespace: str) -> list[str]:
    """The server's command. It answers 403 to a Host that is not listed, also to the Service's own names."""
    name = mlflow.name
    hosts = [name, f"{name}.{namespace}", f"{name}.{namespace}.svc", f"{name}.{namespace}.svc.cluster.local"]
    allowed = [*(f"{host}:{PORT}" for host in hosts), *hosts, *mlflow.hosts, "localhost:*", "127.0.0.1:*"]
    login = ["--app-name", "basic-auth"] if mlflow.auth_secret else []
    return [
        "mlflow", "server", "--host", "0.0.0.0", "--port", str(PORT), "--workers", str(mlflow.workers),
        "--artifacts-destination", mlflow.artifacts, "--allowed-hosts", ",".join(allowed), *login,
    ]  # fmt: skip


def mlflow_manifests(spec: ClusterSpec) -> list[Manifest]:
    """Deployment, Service, and the Job that brings the database's tables up to date, which is applied first."""
    mlflow = spec.mlflow
    if mlflow is None:
        return []
    labels = {"app.kubernetes.io/name": mlflow.name}
    upgrade = _pod(spec, mlflow, ["sh", "-c", 'mlflow db upgrade "$MLFLOW_BACKEND_STORE_URI"'])
    upgrade["restartPolicy"] = "Never"
    serve = _pod(spec, mlflow, server_arguments(mlflow, spec.kubernetes.namespace))
    probe = {"httpGet": {"path": "/health", "port": PORT}, "periodSeconds": 10, "timeoutSeconds": 5}
    serve["containers"][0] |= {
        "ports": [{"name": "http", "containerPort": PORT}],
        # its first start imports for a minute on a small node
        "startupProbe": {**probe, "failureThreshold": 30},
        "readinessProbe": probe,
        "livenessProbe": {**probe, "failureThreshold": 6},
    }
    return [
        *_postgres(spec, mlflow),
        {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": _metadata(spec, f"{mlflow.name}-db-upgrade", labels),
            "spec": {
                "backoffLimit": 3,
                "ttlSecondsAfterFinished": 86400,
                "template": {"metadata": {"labels": labels}, "spec": upgrade},
            },
        },
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": _metadata(spec, mlflow.name, labels),
            "spec": {
                "replicas": 1,
                "selector": {"matchLabels": labels},
                "template": {"metadata": {"labels": labels}, "spec": serve},
            },
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": _metadata(spec, mlflow.name, labels),
            "spec": {"selector": labels, "ports": [{"name": "http", "port": PORT, "targetPort": PORT}]},
        },
    ]


DATABASE_PORT = 5432
_DATABASE_UID = 999
"""PostgreSQL's user in its image."""


def database_name(mlflow: MlflowSection) -> str:
    """What the rendered PostgreSQL is called: the host in the Secret's `uri`."""
    return f"{mlflow.name}-postgres"


def _postgres(spec: ClusterSpec, mlflow: MlflowSection) -> list[Manifest]:
    """PostgreSQL of one pod, which the server's pods alone reach."""
    postgres = mlflow.postgres
    if postgres is None:
        return []
    name, labels = database_name(mlflow), {"app.kubernetes.io/name": database_name(mlflow)}
    probe = {"exec": {"command": ["pg_isready", "-U", "mlflow", "-d", "mlflow"]}, "periodSeconds": 10}
    resources = {"cpu": f"{postgres.cpus:g}", "memory": f"{postgres.memory_gib}Gi"}
    container = {
        "name": "postgres",
        "image": postgres.image,
        "env": [
            {"name": "POSTGRES_USER", "value": "mlflow"},
            {"name": "POSTGRES_DB", "value": "mlflow"},
            {"name": "POSTGRES_PASSWORD",
             "valueFrom": {"secretKeyRef": {"name": mlflow.database_secret, "key": "password"}}},
            # below the volume's root, where file systems keep what is theirs
            {"name": "PGDATA", "value": "/var/lib/postgresql/data/pgdata"},
        ],
        "ports": [{"name": "postgres", "containerPort": DATABASE_PORT}],
        "startupProbe": {**probe, "failureThreshold": 30},
        "readinessProbe": probe,
        "livenessProbe": {**probe, "failureThreshold": 6},
        "resources": {"limits": {"memory": resources["memory"]}, "requests": resources},
        "volumeMounts": [{"name": "data", "mountPath": "/var/lib/postgresql/data"}],
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }  # fmt: skip
    pod = {
        "containers": [container],
        "automountServiceAccountToken": False,
        # ends its connections and writes its log before it is killed
        "terminationGracePeriodSeconds": 120,
        "securityContext": {
            "runAsNonRoot": True, "runAsUser": _DATABASE_UID, "runAsGroup": _DATABASE_UID, "fsGroup": _DATABASE_UID,
            "fsGroupChangePolicy": "OnRootMismatch", "seccompProfile": {"type": "RuntimeDefault"},
        },
    }  # fmt: skip
    claim: dict[str, Any] = {
        "accessModes": ["ReadWriteOnce"],
        "resources": {"requests": {"storage": f"{postgres.storage_gib}Gi"}},
    }
    if postgres.storage_class:
        claim["storageClassName"] = postgres.storage_class
    clients = [{"podSelector": {"matchLabels": {"app.kubernetes.io/name": mlflow.name}}}]
    port = {"protocol": "TCP", "port": DATABASE_PORT}
    return [
        {
            "apiVersion": "apps/v1",
            "kind": "StatefulSet",
            "metadata": _metadata(spec, name, labels),
            "spec": {
                "serviceName": name,
                "replicas": 1,
                "selector": {"matchLabels": labels},
                "template": {"metadata": {"labels": labels}, "spec": pod},
                "volumeClaimTemplates": [{"metadata": {"name": "data"}, "spec": claim}],
            },
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": _metadata(spec, name, labels),
            "spec": {
                "selector": labels,
                "ports": [{"name": "postgres", "port": DATABASE_PORT, "targetPort": DATABASE_PORT}],
            },
        },
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": _metadata(spec, name, labels),
            "spec": {
                "podSelector": {"matchLabels": labels},
                "policyTypes": ["Ingress"],
                "ingress": [{"from": clients, "ports": [port]}],
            },
        },
    ]


def _pod(spec: ClusterSpec, mlflow: MlflowSection, command: list[str]) -> Manifest:
    uri = {"secretKeyRef": {"name": mlflow.database_secret, "key": "uri"}}
    sources = [*mlflow.artifacts_secrets, *([mlflow.auth_secret] if mlflow.auth_secret else [])]
    variables: list[dict[str, Any]] = [
        {"name": "MLFLOW_BACKEND_STORE_URI", "valueFrom": uri},
        {"name": "MLFLOW_SQLALCHEMYSTORE_POOL_SIZE", "value": str(mlflow.pool_size)},
        {"name": "MLFLOW_SQLALCHEMYSTORE_MAX_OVERFLOW", "value": str(mlflow.pool_size)},
        # models are pickles as a rule: a server has no reason to open one
        {"name": "MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "value": "false"},
    ]
    if spec.storage.endpoint:
        variables.append({"name": "MLFLOW_S3_ENDPOINT_URL", "value": spec.storage.endpoint})
    resources = {"cpu": str(mlflow.workers), "memory": f"{1 + mlflow.workers}Gi"}
    container = {
        "name": "mlflow",
        "image": mlflow.image or spec.image,
        "command": command,
        "env": variables,
        **({"envFrom": [{"secretRef": {"name": one}} for one in sources]} if sources else {}),
        "resources": {"limits": {"memory": resources["memory"]}, "requests": resources},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    pull = spec.kubernetes.image_pull_secret
    return {
        "containers": [container],
        "automountServiceAccountToken": False,
        "securityContext": {"runAsNonRoot": True, "runAsUser": UID, "seccompProfile": {"type": "RuntimeDefault"}},
        **({"imagePullSecrets": [{"name": pull}]} if pull else {}),
    }


def _metadata(spec: ClusterSpec, name: str, labels: dict[str, str]) -> Manifest:
    return {"name": name, "namespace": spec.kubernetes.namespace, "labels": labels}
