"""The form in which data come to a network."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Form:
    """Images or clips, their size, and which frames of a video a clip takes.

    Attributes:
        video: clips of videos, not images.
        image_size: height and width, pixels.
        clip_len: frames of a clip; 1 for images.
        frame_interval: frames of the video from one frame of a clip to the next.
        flip: half of the samples are mirrored.
    """

    video: bool
    image_size: int
    clip_len: int = 1
    frame_interval: int = 1
    flip: bool = False

    @property
    def kind(self) -> str:
        """What people call the samples."""
        return "clips" if self.video else "images"

    @property
    def window(self) -> int:
        """Frames of the video from a clip's first frame to its last."""
        return 1 + (self.clip_len - 1) * self.frame_interval
