"""The held-out loss: that of the averaged weights on clips kept from training, always with the same noise and γ."""

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from data.contents import Content, first_window, open_path
from data.form import Form
from data.latent_space import LatentSpace
from data.latents import VAE, batch_moments, to_unit_range
from data.packs.pack import is_pack
from data.source import Source
from data.untrusted import Unreadable
from objective import Objective
from precision import Precision
from runtime import cli, distributed
from runtime.errors import UserError, shown
from runtime.logs import log
from runtime.random_numbers import seed_draws

SAMPLES, LEVELS, SEED = 512, 8, 0
CHUNK = 16  # rows of the network at once, always as many: another number could round otherwise


def add_held_out_args(group: argparse._ActionsContainer) -> None:
    """Adds --eval-path, --eval-every, --eval-samples and --keep-best."""
    group.add_argument("--eval-path", type=cli.path, metavar="PATH", help="held-out data, for the held-out loss")
    group.add_argument("--eval-every", type=cli.positive_int, default=1000, help="steps between held-out losses")
    group.add_argument("--eval-samples", type=cli.count, default=SAMPLES, help="held-out files: the first by path")
    best = "also keep the checkpoint with the lowest held-out loss, and save it when it is found"
    group.add_argument("--keep-best", action="store_true", help=best)


def held_out_of(
    args: argparse.Namespace,
    form: Form,
    source: Source,
    classes: tuple[str, ...],
    device: torch.device,
    precision: Precision,
) -> "HeldOut | None":
    """What --eval-path names, in the form of the training data; None without this flag. Every rank must call it.

    Raises:
        UserError: there is nothing in this form, or a class that the run does not know.
    """
    if not args.eval_path:
        if args.keep_best:
            raise UserError("--keep-best keeps the checkpoint with the lowest held-out loss: add --eval-path")
        return None
    space, vae = source.space, source.vae
    if space and not vae and not is_pack(args.eval_path):
        vae = source.decoder(device, precision)
    return distributed.together(lambda: HeldOut(args.eval_path, args.eval_samples, form, space, vae, classes, device))


class HeldOut:
    """Held-out samples, and how well a network does on them.

    Sample i has one γ in each eighth of [0, 1). Its noise and γ follow from i alone. Latents are the means of their
    posteriors. No label is dropped.

    Args:
        classes: the names of the classes that the network knows. Those of the samples are matched by name.

    Raises:
        UserError: there is nothing in this form, a class that the network does not know, or a damaged file: ranks share
            the work of reading all files once, since a training should not end at its first held-out loss.
    """

    def __init__(
        self,
        path: Path,
        count: int,
        form: Form,
        space: LatentSpace | None,
        vae: VAE | None,
        classes: tuple[str, ...],
        device: torch.device,
    ):
        self.content: Content = open_path(path, form, space, "--eval-path", first_window)
        self.count, self.space, self.vae, self.device = min(count, len(self.content.names)), space, vae, device
        known = {name: label for label, name in enumerate(classes)}
        for name in self.content.classes[: self.count]:
            if name not in known:
                raise UserError(
                    f"--eval-path {path} holds the class {shown(name)!r}, which the run does not know: give data of its"
                    f" classes ({', '.join(map(shown, classes[:5]))}, …)"
                )
        self.labels = [known[name] for name in self.content.classes[: self.count]]
        for index in range(distributed.rank(), self.count, distributed.world_size()):
            self.read_pixels(index)

    def read_pixels(self, index: int) -> tuple[Tensor, float]:
        """A sample as its content has it, and its seconds per frame.

        Raises:
            UserError: it cannot be read. A loss without it could not be compared.
        """
        try:
            return self.content.read(index)
        except Unreadable as error:
            name = shown(self.content.names[index])
            raise UserError(f"--eval-path: {name} cannot be read: {error}: remove or replace it") from None

    def read(self, index: int) -> tuple[Tensor, float]:
        """The network's input for a sample, (C, [T,] H, W) float32, and its seconds per frame. As `read_pixels`."""
        x, seconds = self.read_pixels(index)
        x = x.to(self.device)
        if not self.space:
            return to_unit_range(x), seconds
        means = batch_moments(self.vae, x[None])[:, 0] if x.dtype == torch.uint8 else x[None]  # (1, C, [T,] h, w)
        return self.space.normalised(means.float())[0], seconds

    def draws(self, index: int, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """A sample's noise (LEVELS, …) and γ (LEVELS,), one in each eighth."""
        generator = torch.Generator()
        seed_draws(generator, SEED, index)
        noise = torch.randn(LEVELS, *shape, generator=generator)  # (LEVELS, …)
        gamma = (torch.arange(LEVELS) + torch.rand(LEVELS, generator=generator)) / LEVELS  # (LEVELS,)
        return noise.to(self.device), gamma.to(self.device)

    @torch.no_grad()
    def measure(self, network: nn.Module, objective: Objective) -> tuple[dict[str, float], float]:
        """The held-out loss, by eighths of γ too, and the error of the clip; and the seconds that this took.

        The loss is uniform in γ and unweighted, whatever the objective's weights and distribution of γ are, so that
        runs compare. Every rank must call it, with the same network. The numbers are the same for any number of ranks.

        Raises:
            UserError: a sample cannot be read.
        """
        start, chunk = time.perf_counter(), CHUNK // LEVELS
        starts = range(0, self.count, chunk)[distributed.rank() :: distributed.world_size()]
        mine = distributed.together(
            lambda: {first: self.errors(range(first, first + chunk), network, objective) for first in starts}
        )
        parts = {first: part for known in distributed.gather(mine) for first, part in known.items()}
        # In float64 and in the order of the samples, whoever computed them.
        errors = torch.cat([parts[first] for first in sorted(parts)])[: self.count].double()  # (N, 2, LEVELS)
        loss, clip = errors.mean(0)  # (LEVELS,) each
        found = {"held_out_loss": loss.mean().item()}
        found |= {f"held_out_loss_{level + 1}": value for level, value in enumerate(loss.tolist())}
        if clip.isfinite().all():
            found["held_out_clip_error"] = clip.mean().item()
        seconds = time.perf_counter() - start
        log.info("held-out loss: %.4f, of %d samples, in %.1f s", found["held_out_loss"], self.count, seconds)
        return found, seconds

    def errors(self, indices: range, network: nn.Module, objective: Objective) -> Tensor:
        """Errors of the field and of the clip of samples, at each level, (N, 2, LEVELS) on the host.

        Indices beyond the last sample repeat it, so that each call has as many rows.
        """
        indices = [min(index, self.count - 1) for index in indices]
        read = [self.read(index) for index in indices]
        draws = [self.draws(index, x.shape) for index, (x, _) in zip(indices, read, strict=True)]
        x = torch.cat([x.expand(LEVELS, *x.shape) for x, _ in read])  # (N·LEVELS, …)
        noise, gamma = (torch.cat(parts) for parts in zip(*draws, strict=True))  # (N·LEVELS, …), (N·LEVELS,)
        y = torch.tensor([self.labels[i] for i in indices], device=self.device).repeat_interleave(LEVELS)
        seconds = torch.tensor([each for _, each in read], device=self.device).repeat_interleave(LEVELS)
        x_gamma = objective.interpolate(x, noise, gamma)  # (N·LEVELS, …)
        field = network(x_gamma, gamma, y, seconds).float()  # (N·LEVELS, …)
        wrong = field - objective.target(x, noise, gamma), objective.clip_of(x_gamma, field, gamma) - x
        by_sample = torch.stack([error.square().flatten(1).mean(1) for error in wrong])  # (2, N·LEVELS)
        return by_sample.unflatten(1, (len(indices), LEVELS)).transpose(0, 1).cpu()
