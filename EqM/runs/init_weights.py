"""New networks that start from the weights of another checkpoint (--init-weights)."""

from pathlib import Path

from models import EqM
from network_settings import load_weights
from runs.config import Config
from runs.load_network import TABLE, read_stored
from runs.resume import TELLING
from runtime.errors import UserError
from runtime.plain_data import shape_of

PLACES = "pos_embed"


def start_from(network: EqM, config: Config, path: Path) -> list[str]:
    """Gives a new network the averaged weights of a checkpoint, ours or a published one.

    The table of labels begins anew, unless the checkpoint names the same classes. Positions stay those of the new
    network, whose pictures may have another size, or whose positions another kind.

    Returns:
        What was loaded and what was not, for the log.

    Raises:
        UserError: there is no such checkpoint, or its network has another output, width, depth or patch.
    """
    (weights, before, _), fresh = read_stored(path), network.state_dict()
    if before and before.network.energy != config.network.energy:
        energies = f"{before.network.energy}, and this run has {config.network.energy}"
        raise UserError(f"--init-weights {path} was trained with --ebm {energies}: give the same")
    theirs, ours = ("clip" if each and each.network.clip_gain else "field" for each in (before, config))
    if theirs != ours:
        outputs = f"{theirs}, and this run has {ours}"
        raise UserError(f"--init-weights {path} was trained with --predict {outputs}: give the same")
    same_classes = before and before.class_names == config.class_names
    anew = [] if same_classes else [TABLE]
    # Pictures of another size may have as many patches. Published ones are square.
    same_size = before.network.size == config.network.size if before else isinstance(config.network.size, int)
    before_and_now = [shape_of(each[PLACES]) if PLACES in each else None for each in (weights, fresh)]
    same_places = before_and_now[0] == before_and_now[1] and (same_size or PLACES not in fresh)
    anew += [] if same_places else [PLACES]
    loaded = {name: tensor for name, tensor in weights.items() if name not in anew}
    try:
        load_weights(network, loaded | {name: fresh[name] for name in anew if name in fresh}, f"--init-weights {path}")
    except UserError as error:
        raise UserError(f"{error} (size, patches, temporal patch and output must be the same)") from None
    notes = [f"--init-weights: started from the averaged weights of {path}"]
    if not same_classes:
        notes.append("--init-weights: the table of labels was not loaded, and begins anew: other or unknown classes")
    if PLACES in anew:
        why = "pictures or clips have another size" if all(before_and_now) else "they are rotary in one of the networks"
        notes.append(f"--init-weights: the positions were not loaded: {why}")
    theirs, ours = before.kept_flags() if before else {}, config.kept_flags()
    differ = [name for name in TELLING if name in theirs and theirs[name] != ours[name] and name != "init_weights"]
    return notes + [f"--{name.replace('_', '-')} was {theirs[name]} there and is {ours[name]} here" for name in differ]
