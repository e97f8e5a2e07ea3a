"""Settings from a JSON file, as a run writes them and `--print_config` prints them: `--config=FILE.json`."""

from pathlib import Path

from ml_collections import config_dict

from qwenla_jax.config.run_options import RunOptions
from qwenla_jax.config.schema import ConfigError, build, to_config_dict
from qwenla_jax.distill.distill_options import DistillOptions
from qwenla_jax.utils import json_files


def get_config(path: str) -> config_dict.ConfigDict:
    """The settings of a file; keys that it leaves out have their defaults.

    Raises:
      ConfigError: unknown keys or impossible values; or the file cannot be read, or is not a JSON object.
    """
    try:
        saved, problem = json_files.read_object(Path(path)), None
    except (ValueError, OSError) as error:
        saved, problem = {}, str(error)
    if problem is not None:  # raised here, not above: the command line shows the innermost error
        raise ConfigError(f"--config: {problem}")
    return to_config_dict(build(DistillOptions if "sampling" in saved else RunOptions, saved))
