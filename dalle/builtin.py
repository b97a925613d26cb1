"""The model that travels with the project."""

from pathlib import Path

NAME = "scenes"
FOLDER = Path(__file__).parent / "models" / NAME
ABOUT = (
    "one to four flat-coloured shapes on a plain background, such as "
    '"a red circle left of a blue square" or "three yellow stars on a black background"'
)


def find_run(run: Path) -> Path:
    """The folder of a run: `run` itself, or the built-in model where that is asked for by its name.

    A folder of that name in the working directory goes first.
    """
    return FOLDER if run == Path(NAME) and not run.exists() else run
