"""Networks as people exchange them: a folder with weights, config and card, of a disk or of the Hugging Face hub.

    model.safetensors   the averaged weights, under the names of published EqM and SiT checkpoints
    config.json         what `Config.as_dict` says of the network, its data, its latents and its objective
    README.md           a card for people, and samples.png, a picture for it

Nothing is pickled. A .safetensors file with another name may lie beside its config.json too.
"""

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from network_settings import NetworkSettings
from runs.checkpoint import network_weights
from runs.config import OLD_MEANINGS, Config, config_of
from runtime.errors import UserError, first_line, is_out_of_memory
from runtime.files import check_takes_files, flush, open_regular, parse_json
from runtime.hub import check_hub
from runtime.interrupts import undone_at_ctrl_c
from runtime.plain_data import brief, brief_names, check_shapes, shape_of

FORMAT = "format_version"
VERSION = 1  # of config.json; what a version means never changes
WEIGHTS, CONFIG, CARD, PICTURE = "model.safetensors", "config.json", "README.md", "samples.png"
MOST_CONFIG_BYTES = 2**24  # the names of a million classes
FLOATS = ("F64", "F32", "F16", "BF16")  # the types of numbers, as safetensors calls them
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
FILE_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".json", ".safetensors")  # with one of these it is no id of the hub


def find_place(path: Path) -> Path:
    """The path itself, or the folder in the hub's cache if nothing is there and it reads like an id, user/name.

    What the cache has is taken without asking the hub.

    Raises:
        UserError: the hub cannot be reached or has no such network, and the cache does not have it either.
    """
    name = str(path)
    if os.path.lexists(path) or path.suffix in FILE_SUFFIXES or not HUB_ID.fullmatch(name):
        return path
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    try:
        if all(isinstance(try_to_load_from_cache(name, file), str) for file in (CONFIG, WEIGHTS)):
            return Path(try_to_load_from_cache(name, CONFIG)).parent
        check_hub(name, "--ckpt")
        files = [hf_hub_download(name, file) for file in (CONFIG, WEIGHTS)]
    except UserError as error:
        raise UserError(f"there is no file or folder {name}, and {error}") from None
    except Exception as error:  # each version of the package has its own error types
        if is_out_of_memory(error):
            raise
        raise UserError(f"{name} cannot be had from the Hugging Face hub: {first_line(error)}") from None
    return Path(files[0]).parent


def is_exchanged(path: Path) -> bool:
    """True for what `read_exchanged` reads, False for a file of torch.save."""
    return path.is_dir() or path.suffix == ".safetensors"


def read_exchanged(path: Path) -> tuple[dict[str, Tensor], Config | None]:
    """The weights of a folder, or of a .safetensors file, on the CPU, and the config beside them.

    Only a file may lack a config, as a published one does. Otherwise names, shapes and types of the weights are
    checked before any of them is read.

    Raises:
        UserError: files are missing, damaged, or of another network, program or version.
    """
    weights = path / WEIGHTS if path.is_dir() else path
    config_path = weights.with_name(CONFIG)
    for needed in (weights, config_path) if path.is_dir() else (weights,):
        if not os.path.lexists(needed):
            advice = "give a folder that EqM/export.py wrote, or a checkpoint"
            raise UserError(f"{path} holds no exported network ({needed.name} is missing): {advice}")
    config = read_config(config_path) if os.path.lexists(config_path) else None
    return read_weights(weights, config and config.network), config


def read_config(path: Path) -> Config:
    """The config of an exported network. Raises UserError if it is damaged, or of another program or version."""
    try:
        with open_regular(path) as file:
            if file.seek(0, 2) > MOST_CONFIG_BYTES:
                raise ValueError(f"it has more than {MOST_CONFIG_BYTES:,} bytes")
        contents = parse_json(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged: {first_line(error)}") from None
    version = contents.pop(FORMAT, None) if isinstance(contents, dict) else None
    if type(version) is not int or version != VERSION:
        found = f"{FORMAT} is {brief(version)}, and this version of EqM knows {VERSION}"
        raise UserError(f"{path} is not from EqM/export.py, or from another version ({found})")
    return config_of(contents, path)


def read_weights(path: Path, settings: NetworkSettings | None) -> dict[str, Tensor]:
    """The tensors of a .safetensors file on the CPU, without wrapper prefixes.

    Args:
        settings: whose tensors they must be, by name and shape; None: not known.

    Raises:
        UserError: the file is damaged, or holds something else.
    """
    from safetensors import SafetensorError, safe_open

    try:
        open_regular(path).close()  # safetensors itself would wait for a pipe
        with safe_open(path, framework="pt") as file:
            header = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            for name, entry in header.items():
                if entry.get_dtype() not in FLOATS:
                    raise UserError(f"{path}: {brief(name)} holds {entry.get_dtype()}, not one of {', '.join(FLOATS)}")
            if settings:
                expected = {name: shape_of(tensor) for name, tensor in settings.check(path).state_dict().items()}
                check_shapes(expected, {name: tuple(entry.get_shape()) for name, entry in header.items()}, path)
            return network_weights({name: file.get_tensor(name) for name in header}, path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or first_line(error)}") from None
    except SafetensorError as error:
        raise UserError(f"{path} is cut short or is no .safetensors file: {first_line(error)}") from None


def exchanged_config(config: Config) -> dict:
    """The contents of config.json: the config without the flags and paths that mean nothing on another machine."""
    flags = {name: value for name, value in config.flags.items() if name in OLD_MEANINGS}
    space = config.space
    if space and Path(space.name).is_absolute():
        space = replace(space, name=Path(space.name).name)
    return {FORMAT: VERSION} | replace(config, flags=flags, space=space).as_dict()


def write_weights(path: Path, weights: dict[str, Tensor]) -> None:
    """Writes tensors as safetensors, bit by bit as they are.

    Raises:
        OSError: the disk is full or fails.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path, {"format": "pt"})
    except SafetensorError as error:  # its name for what the system refuses
        raise OSError(None, first_line(error), str(path)) from None
    umask = os.umask(0)  # safetensors makes a file that its owner alone may read
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def check_replaceable(folder: Path) -> None:
    """Makes the folder above.

    Raises:
        UserError: `write_folder` would replace what no export wrote, or the disk cannot be written.
    """
    try:
        check_takes_files(folder.parent)
        names = {path.name for path in folder.iterdir()} if os.path.lexists(folder) else set()
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from None
    if not names:
        return
    strange = sorted(names - {WEIGHTS, CONFIG, CARD, PICTURE})
    try:
        if not strange:
            read_config(folder / CONFIG)
    except UserError:
        strange = sorted(names)
    if strange:
        raise UserError(f"{folder} holds {brief_names(strange)}, and no exported network: name a new folder")


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Has `write` fill a temporary folder, and renames it to `folder`, which is whole or absent at any time.

    An export that was there before is replaced. If the process is killed just then, it is left under another name.

    Raises:
        UserError: it cannot be written. Other errors are those of `write`.
    """
    temporary, before = (folder.with_name(f"{folder.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))

    def undo() -> None:
        if before.exists() and not folder.exists():
            before.rename(folder)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(before, ignore_errors=True)

    try:
        with undone_at_ctrl_c(undo):
            try:
                temporary.mkdir()
                write(temporary)
                for path in (*temporary.iterdir(), temporary):
                    flush(path)
                if folder.exists():
                    folder.rename(before)
                temporary.rename(folder)
                flush(folder.parent)
            finally:
                undo()
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}") from None
