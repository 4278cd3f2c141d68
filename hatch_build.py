"""Put the data-only folders inside the package, in real wheels only: an editable install reads them where they lie."""

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

DATA_FOLDERS = ("architectures", "recipes", "schemas")


class DataFolders(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "standard":
            for folder in DATA_FOLDERS:
                build_data["force_include"][folder] = f"moeut_compose/{folder}"
