"""Two processes that train together, started as by torchrun but faster."""

from torch.distributed import TCPStore

from annotated_mpnet.mpnet.config import flag
from annotated_mpnet.settings.config import PretrainingConfig
from annotated_mpnet.settings.config_file import ACTIONS, arguments_from_toml, to_toml
from processes import Command
from waiting import HUNG


def arguments_of(config: PretrainingConfig) -> list[str]:
    """Return the command line of a configuration."""
    # A file does not hold actions of a single start.
    actions = {name: getattr(config.run, name) for name in ACTIONS}
    return arguments_from_toml(to_toml(config), "test") + [
        flag(name) if value is True else f"{flag(name)}={value}"
        for name, value in actions.items()
        if value not in (False, None, "")
    ]


def open_store() -> TCPStore:
    """Open the store by which processes find each other. As with torchrun, it outlives them."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """Return the variables that torchrun sets for a process."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "OMP_NUM_THREADS": "1",
    }


class Started:
    """A run of several processes.

    Attributes:
        processes: one for each rank.
    """

    def __init__(
        self, config: PretrainingConfig, size: int = 2, *others: PretrainingConfig, limit: int = 0
    ) -> None:
        """Start a command on all ranks, or others on the later ranks; `limit` as in `Command`."""
        self._store = open_store()
        configs = [config, *others, *[config] * (size - 1 - len(others))]
        self.processes = [
            Command(arguments_of(configs[rank]), environment(rank, size, self._store.port), limit)
            for rank in range(size)
        ]

    def endings(self) -> list[tuple[int, str, str]]:
        """Wait for all; return each one's exit code, standard output and standard error."""
        try:
            pairs = [process.communicate(timeout=HUNG) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        codes = [process.returncode for process in self.processes]
        return [(code, *pair) for code, pair in zip(codes, pairs, strict=True)]


def run_ranks(config: PretrainingConfig, size: int = 2) -> str:
    """Run successfully; return the output of the first process."""
    endings = Started(config, size).endings()
    assert [code for code, _, _ in endings] == [0] * size, endings
    return endings[0][1]
