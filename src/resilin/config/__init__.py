"""Typed settings: TOML files and dotted overrides in, frozen objects or a clear message out."""

from resilin.config.component import component, use_path
from resilin.config.errors import SettingsError, UserError
from resilin.config.load import load_settings, parse_settings
from resilin.config.settings import Settings
from resilin.config.write import settings_to_toml

__all__ = [
    "Settings",
    "SettingsError",
    "UserError",
    "component",
    "load_settings",
    "parse_settings",
    "settings_to_toml",
    "use_path",
]
