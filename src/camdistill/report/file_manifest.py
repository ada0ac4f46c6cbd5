"""The list of files that an analysis wrote, so that the next one removes these alone.

`written.txt` has a line a file, relative to the folder, and gets it before the file is written: a
run that was killed leaves nothing that nobody owns. A file of events, whose name begins with the
time, is listed by a pattern that no other file has.
"""

from collections.abc import Collection
from pathlib import Path

from camdistill.errors import UserError
from camdistill.store.atomic_files import write_atomically

LIST = "written.txt"
SWEEP = "sweep.safetensors"  # what all images gave: outlives the report that was made of it
EVENTS = "events.out.tfevents.*"


class FileManifest:
    """The list of one folder.

    Attributes:
        folder: Where.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def files(self) -> list[Path]:
        """What an analysis wrote, in this folder or below it; files that are gone too."""
        try:
            lines = (self.folder / LIST).read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return []
        inside = [Path(line) for line in lines if line and ".." not in Path(line).parts]
        listed = [path for path in dict.fromkeys(inside) if not path.is_absolute()]
        patterns = [str(path) for path in listed if "*" in path.name]
        matched_files = [file for pattern in patterns for file in self.folder.glob(pattern)]
        return [*(self.folder / path for path in listed), *matched_files]

    @property
    def runs(self) -> list[str]:
        """Folders of TensorBoard's events that it wrote."""
        events = [file for file in self.files if file.match(EVENTS) and file.is_file()]
        return list(dict.fromkeys(file.parent.name for file in events))

    def check_free(self, files: Collection[str]) -> None:
        """Before a long analysis: nothing of others is where it will write, and no other run.

        TensorBoard shows all events below a folder, those of a training run among the report's.

        Raises:
            UserError: Somebody else's events or results are there.
        """
        listed = set(self.files)
        results = [self.folder / name for name in files if (self.folder / name).exists()]
        if foreign := [file for file in results if file not in listed]:
            raise UserError(
                f"{foreign[0]} is there, and no analysis listed in {LIST} wrote it; give another "
                "--out"
            )
        events = sorted(self.folder.rglob(EVENTS), key=lambda file: (len(file.parts), file))
        if others := [file for file in events if file not in listed]:
            base = self.folder if self.folder.name else self.folder.absolute()
            raise UserError(
                f"{others[0].parent} holds another run's events, which TensorBoard would show "
                f"among the report's; give another --out, such as {base}-layers"
            )

    def clear(self) -> None:
        """Removes an earlier report but not its sweep, and folders that this leaves empty."""
        files = self.files
        sweep = self.folder / SWEEP
        for file in files:
            if file != sweep:
                file.unlink(missing_ok=True)
        for folder in {file.parent for file in files} - {self.folder}:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        if sweep in files and sweep.exists():
            write_atomically(self.folder / LIST, f"{SWEEP}\n".encode())
        else:
            (self.folder / LIST).unlink(missing_ok=True)

    def add(self, path: Path) -> Path:
        """Notes a file that is about to be written, and gives it back."""
        if path in self.files:
            return path
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / LIST).open("a", encoding="utf-8") as file:
            file.write(f"{path.relative_to(self.folder).as_posix()}\n")
        return path
