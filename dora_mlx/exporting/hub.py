"""Upload an export to the Hugging Face Hub."""

from pathlib import Path

from dora_mlx.errors import UserError
from dora_mlx.exporting.model_card import CARD_FILE, model_card
from dora_mlx.exporting.report import REPORT_FILE, ExportReport, report_path
from dora_mlx.registry import HUB_NAME


def check_push(repo: str) -> None:
    """Find out before any work whether an upload could begin; asks no network.

    Raises:
        UserError: If ``repo`` cannot be a name on the Hub, or nobody is signed in.
    """
    from huggingface_hub import get_token

    if not HUB_NAME.fullmatch(repo):
        raise UserError(
            f"--push {repo!r} is no name on the Hub, which has the form owner/name with letters, "
            "digits, dots, dashes and underscores."
        )
    if get_token() is None:
        raise UserError(
            "You are not signed in to the Hugging Face Hub: run `hf auth login` first, or set "
            "HF_TOKEN to a token that may write."
        )


def upload(report: ExportReport, repo: str, *, public: bool = False) -> None:
    """Upload an export that is in place, with its report and a model card.

    Args:
        report: Of the export.
        repo: ``owner/name``; made if it is not there, private unless ``public``.
        public: Whether a new repository can be seen by everybody.

    Raises:
        UserError: If the Hub refuses or cannot be reached; the export stays where it is.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, errors

    # See dora_mlx.registry: the base of network errors changes its package.
    http_error: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]
    output = Path(report.output)
    files = {path.name: path for path in _files(output)}
    api = HfApi()
    operations = [
        CommitOperationAdd(name, path)
        for name, path in files.items()
        if name not in (CARD_FILE, REPORT_FILE)
    ]
    operations.append(CommitOperationAdd(CARD_FILE, model_card(report).encode()))
    operations.append(CommitOperationAdd(REPORT_FILE, report_path(output)))
    try:
        api.create_repo(repo, private=not public, exist_ok=True)
        api.create_commit(repo, operations, commit_message=f"Export of {report.run} by dora-mlx")
    except (http_error, OSError, RuntimeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(
            f"The upload to {repo} failed ({first}). The export is in {output}; "
            f"upload it by `hf upload {repo} {output}`, or run this again with --overwrite."
        ) from error


def _files(output: Path) -> list[Path]:
    if output.is_file():
        return [output]
    return sorted(path for path in output.iterdir() if path.is_file())
