"""Other uses of the snapshots, and the methods of others, in one table: what each is called and its published settings.

eekd.train.rivals trains students by them; a command line needs the names at once, before torch.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Rival:
    """An entry of the table.

    Attributes:
        title: what tables and plots call it.
        settings: of the student, as published, where they are not those that all methods share.
        all_snapshots: whether it is taught by all snapshots; else by the last.
        maps: whether it reads feature maps of the last snapshot, which must run in every step.
        betas: what a tuning tries; if empty, multiples of the published β.
    """

    title: str
    settings: dict[str, float] = field(default_factory=dict)
    all_snapshots: bool = False
    maps: bool = False
    betas: tuple[float, ...] = ()


TEMPERATURE = 5.0  # of the paper, for every method that has no other
RIVALS: dict[str, Rival] = {
    "curriculum": Rival("curriculum (RCO)", all_snapshots=True),
    "attention_tau1": Rival("EEKD, learned at τ = 1", all_snapshots=True),
    "dkd": Rival("DKD", {"temperature": 4.0, "beta": 8.0}),
    "dist": Rival("DIST", {"temperature": 4.0, "beta": 2.0}),
    "attention_dkd": Rival("EEKD with DKD's loss", {"temperature": 2.0, "beta": 0.5}, True, betas=(0.5, 2.0)),
    "attention_dist": Rival("EEKD with DIST's loss", {"temperature": 2.0, "beta": 2.0}, True),
    "fitnet": Rival("FitNet", {"beta": 100.0}, maps=True),
    "at": Rival("AT", {"beta": 1000.0}, maps=True),
    "crd": Rival("CRD", {"beta": 0.8}),
}
