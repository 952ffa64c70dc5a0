"""What is measured, and who is."""

from __future__ import annotations

from dataclasses import dataclass

OURS, THEIRS, CHECKPOINTED = "mlxtune", "mlx-lm", "mlx-lm-checkpointed"  # mlx-lm's default is not to checkpoint


@dataclass(frozen=True)
class Measured:
    """One child's figures."""

    who: str  # OURS, THEIRS or CHECKPOINTED
    rows: int  # examples trained on, of which a row of the data may give several
    steps: int  # counted ones
    seconds: float  # of the counted steps together
    tokens: int  # of the rows, padding apart; a row's last token predicts nothing and is not among them
    supervised: int  # tokens whose loss is counted
    processed: int  # tokens that went through the trunk, padding included
    padding: float  # share of padding, over the rows' tokens, where each row is computed whole
    peak_bytes: int  # over the model's own
    base_bytes: int  # of the model's own weights
    device: str  # its kind and name, the activations' type and MLX's version, for people
    head_saved: float = 0.0  # share of the plain way's arithmetic that the head apart from the trunk left out
    prefix_saved: float = 0.0  # share of it that was left out because rows begin alike
    through_head: int = 0  # positions that went through the head
    utilisation: float = 0.0  # needed arithmetic per second, over that of a large matrix product
    computed: str = ""  # what our way leaves out, for people
    unit: str = "row"  # what to call one of `rows`: "row", or "example" where a row gives several
    update: float = 0.0  # share of the seconds that the optimizer's update takes when it is computed alone
    waits: float = 0.0  # for the device, in each micro-batch of a step, the update's among them
    # The parts of a step are handed to the device without waiting for each (`backend.Policy`).
    queued: bool = False
    # Of the same steps the first time, kernels and graphs being compiled; 0: nothing is compiled here.
    first_seconds: float = 0.0
    traced: int = 0  # graphs compiled until all steps were warm
    limits: str = OURS  # whose limits of MLX's memory and cache held: OURS or THEIRS

    @property
    def seconds_per_row(self) -> float:
        return self.seconds / self.rows

    @property
    def seconds_per_token(self) -> float:
        """Of the rows' tokens, computed or not."""
        return self.seconds / self.tokens
