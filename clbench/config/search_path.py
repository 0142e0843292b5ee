"""Where Hydra finds configuration files, clbench's and the plug-ins', and how it reads them. Imports Hydra, no torch."""

from __future__ import annotations

from typing import Any

from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf

from clbench.config import defaults, ray_launcher, sweeper
from clbench.config.registry import operators_after, plugin_dirs


class ClbenchFiles(FileConfigSource):
    """Files in a folder, filled in with the defaults of their targets before any override is applied."""

    @staticmethod
    def scheme() -> str:
        """As in clbench:///path/to/conf."""
        return "clbench"

    def load_config(self, config_path: str) -> ConfigResult:
        """Read a file; in the groups of `defaults` with all options of its target. Scenarios from outside have operators."""
        found, group = super().load_config(config_path), config_path.strip("/").partition("/")[0]
        if group in (*defaults.GROUPS, "scenario") and isinstance(found.config, DictConfig):
            node: Any = OmegaConf.to_container(found.config, resolve=False)
            if group != "scenario":
                found.config = OmegaConf.create(defaults.filled(node))
            elif operators_after({"operators": [], **node}) is not None:
                found.config = OmegaConf.create({**node, "operators": node.get("operators", [])})
        return found


class ClbenchPlugins(SearchPathPlugin):
    """The folder that Hydra was started with, then those of the plug-ins: all read by `ClbenchFiles`."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Change the path in place."""
        for element in search_path.get_path():
            if element.provider == "main":
                element.path = f"clbench://{element.path.removeprefix('file://')}"
        for package, folder in plugin_dirs().items():
            search_path.append(package, f"clbench://{folder}")


def register() -> None:
    """Make both known to Hydra; a second call changes nothing."""
    sweeper.register()
    ray_launcher.register()
    if ClbenchPlugins not in Plugins.instance().discover(SearchPathPlugin):
        Plugins.instance().register(ClbenchFiles)
        Plugins.instance().register(ClbenchPlugins)
