"""The form of samples: images or clips, their size, and how a clip is cut from a video."""

from dataclasses import dataclass, replace

from data.latent_space import LatentSpace
from runtime.size import ImageSize, sides


@dataclass(frozen=True)
class Form:
    """What a sample looks like, and which frames of a video a clip takes.

    Attributes:
        video: samples are clips of videos, not images.
        image_size: height and width, pixels; one number if both are the same.
        clip_len: frames of a clip, as pixels; 1 for images. A VAE may make fewer frames of latents of them.
        frame_interval: a clip takes every frame_interval-th frame of its video.
        flip: mirror half of the samples.
        lengths: the clip lengths that training mixes, ascending, one for each batch; clip_len is the last. Empty: all
            clips have clip_len.
        intervals: the frame intervals that training mixes, in the same way; frame_interval is the first. Empty: all
            clips have frame_interval.
    """

    video: bool
    image_size: ImageSize
    clip_len: int = 1
    frame_interval: int = 1
    flip: bool = False
    lengths: tuple[int, ...] = ()
    intervals: tuple[int, ...] = ()

    @property
    def kind(self) -> str:
        """The word for samples in messages."""
        return "clips" if self.video else "images"

    def of_batch(self, clip_len: int, frame_interval: int) -> "Form":
        """The form of clips of one length and one interval."""
        return replace(self, clip_len=clip_len, frame_interval=frame_interval, lengths=(), intervals=())

    @property
    def is_mixed(self) -> bool:
        """Whether batches have different forms."""
        return bool(self.lengths or self.intervals)

    @property
    def forms(self) -> list["Form"]:
        """One form for each length."""
        return [self.of_batch(length, self.frame_interval) for length in self.lengths] or [self]

    @property
    def batch_forms(self) -> list["Form"]:
        """The forms that batches have, one for each length and interval."""
        intervals = self.intervals or (self.frame_interval,)
        return [self.of_batch(form.clip_len, interval) for form in self.forms for interval in intervals]

    @property
    def window(self) -> int:
        """Frames of the video that a clip spans, from its first frame to its last."""
        return 1 + (self.clip_len - 1) * self.frame_interval

    def input_size(self, space: LatentSpace | None) -> int | tuple[int, int] | tuple[int, int, int]:
        """What a network sees of a sample: a square's side, (H, W) of another image, or (T, H, W), in its own numbers.

        Args:
            space: of the latents that it sees; None: it sees pixels.

        Raises:
            UserError: an image size or a clip length that the VAE does not take.
        """
        size = space.size(self.image_size) if space else self.image_size
        if not self.video:
            return size if isinstance(size, int) else sides(size)
        return (space.frames(self.clip_len) if space else self.clip_len, *sides(size))
