"""Runs on the Hugging Face hub: a repository holds one checkpoint, best.safetensors, and the card that describes it."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rwkv_speech.errors import UserError, first_line

CARD = "README.md"
_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_FILES = (".safetensors", ".pth", ".pt", ".bin")


def is_id(name: str | Path) -> bool:
    """Whether a name is a repository's, NAME/REPO: text, of which nothing is here, not even a folder NAME."""
    if not isinstance(name, str) or not _ID.fullmatch(name) or name.endswith(_FILES):
        return False
    return not (Path(name).exists() or Path(name).parent.exists())


def download(repo: str, file: str, endpoint: str = "") -> Path:
    """A file of a repository, from the hub's cache on this machine if it is there unchanged.

    `endpoint` is the hub's address where it is not the usual one. Raises UserError without such a repository or file,
    and for a hub that does not answer.
    """
    from huggingface_hub import hf_hub_download

    with _explained(repo, f"a file {file}, as `python -m rwkv_speech push` writes it"):
        return Path(hf_hub_download(repo, file, endpoint=endpoint or None))


def upload(folder: Path, repo: str, is_private: bool = False, endpoint: str = "") -> str:
    """Make the files of a folder a commit of a repository, which is made if it is new; the commit's address.

    Raises UserError without a token, without the right to write there, and for a hub that does not answer.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    if not get_token():
        raise UserError(f"{repo}: found no token of the hub, expected one that may write; run: hf auth login")
    api = HfApi(endpoint=endpoint or None)
    with _explained(repo, "one that the token may write to"):
        api.create_repo(repo, private=is_private or None, exist_ok=True)
        files = [CommitOperationAdd(path.name, path) for path in sorted(folder.iterdir())]
        return str(api.create_commit(repo, files, commit_message="Trained weights").commit_url)


def front_matter(fields: dict[str, Any], scores: list[dict[str, Any]]) -> str:
    """What the hub reads of a card, as YAML; of each score the fields of huggingface_hub's EvalResult."""
    from huggingface_hub import EvalResult, ModelCardData

    known = {name: value for name, value in fields.items() if value}
    data = ModelCardData(**known, eval_results=[EvalResult(**score) for score in scores] or None)
    return f"---\n{data.to_yaml()}\n---\n"


@contextmanager
def _explained(repo: str, expected: str) -> Iterator[None]:
    """The hub's errors in words that say what to do."""
    from httpx2 import HTTPError
    from huggingface_hub import errors

    try:
        yield
    except ValueError as error:  # a name, or fields of a card, that the hub does not take
        reason = " ".join(str(error).split())
        raise UserError(f"{repo}: the hub refuses it ({reason}); expected NAME/REPO, and a licence it knows") from error
    except errors.GatedRepoError as error:
        raise UserError(f"{repo}: its owner has to let you in, expected that; ask on the hub's page of it") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{repo}: found no folder or file of this name here, and no such repository on the hub that you may see; "
            "expected one of them: mend the name, or log in with: hf auth login"
        ) from error
    except errors.RemoteEntryNotFoundError as error:
        raise UserError(f"{repo}: not a run, expected {expected}; give another repository") from error
    except errors.HfHubHTTPError as error:
        code = error.response.status_code
        if code in (401, 403):
            raise UserError(f"{repo}: the hub refuses the token, expected {expected}; run: hf auth login") from error
        raise UserError(f"{repo}: the hub answers {code} ({first_line(error)}); try again later") from error
    except (errors.LocalEntryNotFoundError, ConnectionError, HTTPError) as error:
        raise UserError(
            f"{repo}: found no folder or file of this name here, and the hub does not answer; expected one of them: "
            "mend the name or the connection"
        ) from error
