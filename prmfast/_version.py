"""The one place that names the version at run time: the installed distribution's own metadata."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("prmfast")
except PackageNotFoundError:
    __version__ = "0+uninstalled"
