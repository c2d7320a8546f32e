"""All code of docs/python.md, run from top to bottom."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoTokenizer

from annotated_mpnet.mpnet.pretraining import MPNetForPretraining
from tiny_run import changed, run, tiny_config, write_text

PAGE = Path(__file__).parents[1] / "docs" / "python.md"


# Other libraries' trainers warn about future changes.
@pytest.mark.filterwarnings("ignore")
def test_all_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = write_text(tmp_path / "text")
    monkeypatch.chdir(tmp_path)
    Path("my_text.txt").write_text("".join(text.valid_file.read_text()))
    config = tiny_config(text, Path("checkpoints/mine"))
    result, _ = run(changed(config, total_updates=2, eval_interval_steps=2))
    assert result.export is not None
    # Folders with the names of Hub models.
    shutil.copytree(result.export, "microsoft/mpnet-base")
    encoder = SentenceTransformer(str(result.export))
    encoder.save("sentence-transformers/all-mpnet-base-v2")

    code = "\n".join(re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S))
    page: dict[str, object] = {"__name__": "page"}
    exec(compile(code, str(PAGE), "exec"), page)

    # The page's claims about the results.
    losses, vectors, hidden = page["losses"], page["vectors"], page["hidden"]
    assert isinstance(losses, list)
    assert losses[-1] < losses[0]
    assert isinstance(vectors, torch.Tensor)
    assert isinstance(hidden, torch.Tensor)
    assert vectors.shape == (2, hidden.shape[-1])
    theirs = SentenceTransformer("microsoft/mpnet-base").encode(page["sentences"])  # type: ignore[call-overload]
    torch.testing.assert_close(vectors, torch.from_numpy(theirs), atol=1e-5, rtol=0)
    assert isinstance(page["model"], MPNetForPretraining)
    assert AutoTokenizer.from_pretrained("my-encoder").is_fast
    assert Path("checkpoints/second/hf/model.safetensors").exists()
