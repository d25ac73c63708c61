"""A Ray cluster to run on: the one of the job or address that is given, or one started on this machine."""

import http.client
import logging
import os
import socket
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self


class ClusterError(RuntimeError):
    """A cluster that can't be used, and what to do about it."""


@dataclass(frozen=True)
class Resources:
    """What a command needs at once."""

    cpus: float
    gpus: float = 0.0
    remedy: str = "Add nodes"
    """What the user may do, but for asking for less."""
    lighter: "Mapping[str, Resources]" = field(default_factory=dict)
    """Settings of the command with which it would need less, as `--set` takes them."""

    def missing(self, available: Mapping[str, float]) -> str | None:
        """What a cluster as a whole has too few of, and how many; None where it has enough."""
        for name, wanted in (("CPU", self.cpus), ("GPU", self.gpus)):
            if (there := available.get(name, 0.0)) < wanted:
                return f"too few {name}s: this needs {wanted:g}, the Ray cluster has {there:g}"
        return None


class Connection:
    """A connection to Ray, as a context manager. Raises ClusterError with one clear line when it can't be had.

    Inside a Ray job its cluster is used; else that at the address, or at RAY_ADDRESS where none is given; otherwise one
    is started here and ended at exit.
    """

    def __init__(
        self,
        address: str | None = None,
        needs: Resources | None = None,
        dashboard_port: int | None = None,
    ) -> None:
        around = os.environ.get("RAY_ADDRESS")
        # which Ray sets in a job; elsewhere it may be left from other work
        self.address = around if around and (in_job() or not address) else address
        self.note: str | None = None
        """What to tell people where the environment names a cluster and they may not think of it."""
        if around and not in_job() and around != address:
            self.note = f"This runs on the cluster at {self.address}, as RAY_ADDRESS in the environment says."
            if address:
                self.note = f"This runs on the cluster at {address}, as was asked; RAY_ADDRESS={around} is left aside."
        self.needs, self.dashboard_port = needs, dashboard_port
        self._chosen = _WATCHES not in os.environ
        self.dashboard_url: str | None = None
        self.open_warning: str | None = None
        """What to tell people of a standing cluster that asks nobody for a token; None: it asks, or does not answer."""

    def __enter__(self) -> Self:
        try:
            self._connect()
        except BaseException:
            self._forget_choice()
            raise
        return self

    def _connect(self) -> None:
        quiet_ray()
        import ray

        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        try:
            if self.address:
                require_own_address(self.address)
                check_reachable(self.address)
                require_no_dashboard(self.address)
                # said also where it is the default: a node has the environment of whoever started it
                os.environ.setdefault(_WATCHES, "1")
                context = ray.init(address=self.address, **options)
            else:
                if self.dashboard_port is not None:
                    check_port(self.dashboard_port)
                # nobody takes this machine away: Ray Train need not start a process that watches for that
                os.environ.setdefault(_WATCHES, "0")
                context = ray.init(
                    address="local",
                    include_dashboard=self.dashboard_port is not None,
                    dashboard_port=self.dashboard_port,
                    **options,
                )
        except ClusterError:
            raise
        except Exception as error:  # Ray raises bare ones, such as for a node that did not come up in time
            raise ClusterError(f"{_unreachable(self.address)} ({first_line(error)})") from error
        self.dashboard_url = context.dashboard_url or None
        self.open_warning = open_warning(self.dashboard_url) if self.address and self.dashboard_url else None
        if self.needs:
            try:
                check_resources(ray.cluster_resources(), self.needs)
            except ClusterError:
                ray.shutdown()
                raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        import ray
        from ray.exceptions import RayError, RayTaskError

        ray.shutdown()
        self._forget_choice()
        if isinstance(error, RayError) and not isinstance(error, RayTaskError):  # that is of a task's own code
            raise ClusterError(f"the Ray cluster failed meanwhile: {first_line(error)}") from error

    def _forget_choice(self) -> None:
        if self._chosen:
            os.environ.pop(_WATCHES, None)


_WATCHES = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
"""Whether Ray Train watches for nodes that are about to go; what is chosen for one cluster is not for the next."""


def in_job() -> bool:
    """Whether this process is the command of a Ray job, or was started by it."""
    return _IN_JOB in os.environ


_IN_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray for the driver of a job."""


def check_resources(available: Mapping[str, float], needs: Resources) -> None:
    """Raises ClusterError when a cluster as a whole is too small, with the settings for which it is large enough."""
    if (missing := needs.missing(available)) is None:
        return
    fitting = [f"--set {setting}" for setting, less in needs.lighter.items() if less.missing(available) is None]
    less = f", or ask for less: {', or '.join(fitting)}" if fitting else ""
    raise ClusterError(f"{missing}. {needs.remedy}{less}")


def check_reachable(address: str, timeout: float = 3.0) -> None:
    """Raises ConnectionError when nobody listens at `host:port` (or `ray://host:port`); Ray would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        with socket.create_connection((host, int(port)), timeout):
            pass


def require_own_address(address: str) -> None:
    """Raises ClusterError for the address of a dashboard where Ray's own is expected."""
    if address.startswith(("http://", "https://")):
        raise ClusterError(_NOT_RAYS.format(address=address))


def require_no_dashboard(address: str) -> None:
    """Raises ClusterError where a web server, as a dashboard is, listens at `HOST:PORT`: Ray's own port is none."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "://" not in address and speaks_http(f"http://{address}"):
        raise ClusterError(_NOT_RAYS.format(address=address))


_NOT_RAYS = (
    "{address} is the address of a dashboard, which `domainshuttle submit --dashboard` takes. Expected here "
    "(--address, cluster.address, RAY_ADDRESS): Ray's own address, HOST:6379, as `ray start --head` prints it"
)


def speaks_http(url: str, timeout: float = 3.0) -> bool | None:
    """Whether what listens at a URL's host and port answers as a web server does, also with a refusal; None: nobody
    answers in time."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"{url.rstrip('/')}/api/version", timeout=timeout):
            return True
    except urllib.error.HTTPError:
        return True
    except (urllib.error.URLError, TimeoutError):
        return None
    except (http.client.HTTPException, ConnectionError):
        return False
    except (OSError, ValueError):
        return None


def open_warning(dashboard: str, timeout: float = 5.0) -> str | None:
    """A warning where the cluster of a dashboard (`http://HOST:PORT`) answers somebody without a token.

    None where it refuses him, or nobody answers. No token is sent for the question.
    """
    address = dashboard if "://" in dashboard else f"http://{dashboard}"
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"{address.rstrip('/')}/api/version", timeout=timeout) as answer:
            is_ray = b"ray_version" in answer.read(1 << 16)
    except (OSError, ValueError, http.client.HTTPException):  # a refusal (401) is one too
        return None
    return _OPEN.format(address=address) if is_ray else None


_OPEN = (
    "Warning: the Ray cluster at {address} is open: it asks for no token, and whoever reaches it can run programs on "
    "its machines. Secure it: ray get-auth-token --generate > /dev/null, copy ~/.ray/auth_token to every node, set "
    "RAY_AUTH_MODE=token and start the cluster again"
)


def check_port(port: int) -> None:
    """Raises ClusterError when another program listens on a port of this machine."""
    if (error := _taken(port)) is not None:
        others = (*range(port + 1, 1 << 16), *range(1024, port))
        free = next(other for other in others if _taken(other) is None)
        raise ClusterError(
            f"port {port} is busy: another program listens on it. Choose another with "
            f"--set cluster.dashboard_port={free}, or none with --set cluster.dashboard_port=null"
        ) from error


def _taken(port: int) -> OSError | None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            return error
    return None


def quiet_ray() -> None:
    """Leaves of Ray's own messages only warnings: a short run would print hundreds of lines."""
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    # what Ray gave no GPU sees none: torch and DeepSpeed would take it
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
    os.environ.setdefault("RAY_DEDUP_LOGS", "1")
    # deaths of workers are explained by the driver (platform/driver/restarts.py), with Ray's report in a file
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "A worker died or was killed|running low on memory")
    quiet_loggers()


def quiet_loggers() -> None:
    """Leaves only warnings of Ray's loggers, of those too that were set to more when a module of Ray was imported."""
    names = [name for name in logging.root.manager.loggerDict if name.startswith("ray.")]
    for name in ("ray", "ray.data", "ray.train", "ray.tune", *names):
        logging.getLogger(name).setLevel(logging.WARNING)
    # it advises people to turn on what was turned off above
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)


def _unreachable(address: str | None) -> str:
    if not address:
        return "Ray could not be started on this machine"
    return (
        f"no Ray cluster answers at {address}: start one (ray start --head), or unset RAY_ADDRESS and cluster.address "
        "to run on this machine alone; where the cluster uses tokens, set RAY_AUTH_MODE=token and have its token in "
        "~/.ray/auth_token"
    )


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type's name where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
