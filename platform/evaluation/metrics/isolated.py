"""A model in a Ray actor with packages of its own, for code that is pinned to what the product does not run on.

The packages lie in a folder of the actor's node and come first on its path, so that they hide the product's own there
and nowhere else. Ray's `pip` environments would copy the product's whole environment instead, three times where an
install fails. The class that runs there may import nothing of ours but modules that need no other packages.
"""

import hashlib
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from domainshuttle.pipelines.errors import DataError, mask_secrets
from domainshuttle.pipelines.storage.atomic import atomic_folder
from domainshuttle.pipelines.storage.locks import locked
from domainshuttle.platform.evaluation.metrics.cache import cache_folder
from domainshuttle.platform.evaluation.metrics.metric import Needs

_INSTALL_SECONDS = 1800
"""That an install may take, and that others wait for it."""


@dataclass
class Isolated:
    """An object of `kind`, made of `arguments` in its actor, whose methods are called as if it were here.

    The actor starts at the first call, on the cluster that is connected, else on one of this machine. Where it can't,
    this and every later call raise DataError with the same reason: it fails for one case as for the next.
    """

    metric: str
    kind: type
    arguments: tuple[Any, ...]
    needs: Needs
    _actor: Any = field(default=None, init=False, repr=False)
    _fault: str = field(default="", init=False, repr=False)
    _worked: bool = field(default=False, init=False, repr=False)

    def call(self, method: str, *arguments: Any) -> Any:
        """What a method returns. Raises DataError for what it raises, and where the actor can't be started."""
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        if self._fault:
            raise DataError(self._fault)
        try:
            if self._actor is None:
                self._actor = self._start()
            result = ray.get(getattr(self._actor, method).remote(*arguments))
        except RayTaskError as error:
            if not isinstance(error.cause, DataError):  # of the method: the next case may do
                raise DataError(f"{self.metric}: its model raised {_said(error.cause)}") from None
            self._fault = f"{self.metric}: {error.cause}"
        except RayActorError as error:
            self._actor = None  # of one that has worked the next case gets a new one
            if self._worked:
                raise DataError(f"{self.metric}: the actor of its model died: {_said(error)}") from None
            self._fault = f"{self.metric}: its model can't be loaded: {_said(error)}"
        except TypeError as error:  # Ray compares arguments with those of the class before it starts an actor
            self._fault = f"{self.metric}: its model can't be loaded: {_said(error)}"
        else:
            self._worked = True
            return result
        raise DataError(self._fault)

    def _start(self) -> Any:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        if not ray.is_initialized():
            ray.init(address="local", log_to_driver=False, include_dashboard=False)
        # where no node has a GPU it runs on CPUs, as all other metrics do
        gpus = self.needs.gpus if ray.cluster_resources().get("GPU", 0) else 0
        installing = ray.remote(_installed_here).options(num_cpus=0, num_gpus=gpus, max_retries=0)
        node, folder = ray.get(installing.remote(self.needs.packages))
        remote: Any = ray.remote(self.kind)
        actor = remote.options(
            num_cpus=0 if gpus else 1,
            num_gpus=gpus,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
            runtime_env={"env_vars": {"PYTHONPATH": _path_with(folder), "HF_HUB_OFFLINE": "1"}},
        )
        return actor.remote(*self.arguments)


def _installed_here(packages: tuple[str, ...]) -> tuple[str, str]:
    """The id of this node, and the folder of the packages on it."""
    import ray

    return ray.get_runtime_context().get_node_id(), str(installed(packages))


def installed(packages: tuple[str, ...]) -> Path:
    """A folder of this machine with packages and what they need, installed by pip at the first call.

    It is whole or not there. Raises DataError with what pip says where they can't be installed.
    """
    wanted = "\0".join((sys.version, *packages)).encode()
    cache = cache_folder("packages")
    folder = cache / hashlib.blake2b(wanted, digest_size=16).hexdigest()
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_suffix(".lock"), _INSTALL_SECONDS) as held:
        if not held:
            raise DataError(f"another process installs {', '.join(packages)} into {folder} and does not end: end it")
        if not folder.is_dir():
            with atomic_folder(folder) as aside:
                _install(packages, aside)
    return folder


def _install(packages: tuple[str, ...], folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--quiet"]
    try:
        done = subprocess.run(
            [*command, "--target", str(folder), *packages], capture_output=True, text=True, timeout=_INSTALL_SECONDS
        )
        fault = _last_line(done.stderr) if done.returncode else ""
    except (subprocess.SubprocessError, OSError) as error:
        fault = _last_line(str(error))
    if fault:
        raise DataError(
            f"its own packages ({', '.join(packages)}) can't be installed: {fault}. Give the node a network or a "
            "package index (PIP_INDEX_URL) and evaluate again with --again, or leave the metric out"
        )


def _path_with(folder: str) -> str:
    """The search path of this process's own environment with a folder before it."""
    return os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {_last_line(str(error))}"


def _last_line(text: str) -> str:
    """The last line of a text that says something: of pip and of a traceback that is the reason."""
    lines = [line.strip() for line in mask_secrets(text).splitlines() if line.strip() and "[notice]" not in line]
    return lines[-1].removeprefix("ERROR: ").rstrip(".")[:300] if lines else "no reason was given"
