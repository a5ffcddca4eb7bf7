"""What a text says, as columns of items or queries (`pinrec embed`): the vector of a sentence-transformers model, and
words as features."""

from __future__ import annotations

import glob
import os
import re
import sys
import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from pinrec_hf.data.contract import is_string
from pinrec_hf.data.output import replaced

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

ROWS_AT_ONCE = 10_000  # held in memory with their vectors


@cache
def word_pattern() -> re.Pattern[str]:
    """Letters, digits and `_`, as `\\w`, and the marks that stand on letters, without which Hindi falls apart."""
    marks = (chr(code) for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code))[0] == "M")
    return re.compile(rf"\w[\w{''.join(marks)}]*")


def load_text_model(model: str | os.PathLike[str], device: str | None = None) -> SentenceTransformer:
    """Load a sentence-transformers model from a folder or the Hub.

    Raises:
        ImportError: sentence-transformers is not installed.
        OSError: no such model, or no connection to fetch it.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ImportError('embedding texts needs an extra: `pip install ".[embed]"` in the clone') from error
    try:
        return SentenceTransformer(os.fspath(model), device=device)
    except OSError as error:
        raise OSError(f"cannot load {model!r}: {error}; give a model's folder or its name on the Hub") from error


def embed_texts(
    texts: Sequence[str | None],
    model: str | os.PathLike[str] | SentenceTransformer,
    batch_size: int = 256,
    *,
    device: str | None = None,
    progress: bool = True,
) -> np.ndarray:
    """Embed texts, in order.

    Args:
        texts: None is embedded as the empty text, which has a vector like any other.
        model: a folder, a name on the Hub, or a loaded model.
        batch_size: texts a forward pass.
        device: such as `"cuda"`; by default the best there is. A loaded model stays where it is.

    Returns:
        float32 of shape `(len(texts), size)`, not normalised beyond what the model does.

    Raises:
        ValueError: no texts; something that is no text (the message names its row); a model that gives NaN.
    """
    if len(texts) == 0:
        raise ValueError("there are no texts to embed")
    texts = ["" if text is None else text for text in texts]
    wrong = next((place for place, text in enumerate(texts) if not isinstance(text, str)), None)
    if wrong is not None:
        raise ValueError(f"row {wrong}: {texts[wrong]!r} is no text; convert it to str, or give None")
    if isinstance(model, (str, os.PathLike)):
        model = load_text_model(model, device)
    vectors = model.encode(
        texts,
        batch_size=batch_size,
        convert_to_numpy=True,
        show_progress_bar=progress and len(texts) > batch_size,
    )
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        row = int(np.flatnonzero(~finite)[0])
        raise ValueError(f"row {row}: the model gives NaN or infinity for {texts[row]!r}; use another precision")
    return np.asarray(vectors, dtype=np.float32)


def word_features(texts: Sequence[str | None], before: Sequence[Sequence[str] | None] | None = None) -> list[list[str]]:
    """Item features `word=...`, of each text's distinct words in lower case, in order; None has none.

    A model learns what a word says of the next item, which no encoder of sentences was trained for (as fastText learns
    words by a task, arXiv 1607.01759). A script without spaces has sentences for words.

    Args:
        before: features that each item has already: they stay, before the words.
    """
    lower = (unicodedata.normalize("NFC", text or "").lower() for text in texts)
    words = ([f"word={word}" for word in dict.fromkeys(word_pattern().findall(text))] for text in lower)
    return [[*(old or ()), *new] for old, new in zip(before or [None] * len(texts), words, strict=True)]


def embed_parquet(
    input: str | os.PathLike[str],
    *,
    text_column: str,
    model: str | os.PathLike[str] | SentenceTransformer | None = None,
    words: bool = False,
    output: str | os.PathLike[str],
    batch_size: int = 256,
    device: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Write a table again with a column `embedding` (list of float32) or words in `features` (list of strings, after
    those that are there), or both, `ROWS_AT_ONCE` rows at a time.

    Args:
        input: a parquet file, or a glob of several with the same columns; rows keep their order.
        text_column: the column of strings to embed; null counts as the empty text.
        words: whether to add `word_features`.
        output: parquet file to write, whole or not at all.
        model, batch_size, device: see `embed_texts`; no model, no embedding.

    Returns:
        `{"num_rows": ..., "num_null_texts": ..., "embedding_size": ..., "num_features": ...}`, the last two 0 if not
        asked for.

    Raises:
        FileNotFoundError: no such input.
        FileExistsError: `output` exists.
        ValueError: a truncated, foreign or empty input, no such column (the message lists those present), a
            column that is no text, an input that has an `embedding` column already, or `features` that are no lists
            of strings; neither a model nor words.
    """
    if model is None and not words:
        raise ValueError("nothing is asked for: give a model, words=True (--words), or both")
    if os.path.lexists(output):
        raise FileExistsError(f"{output} exists: choose another output, or remove it first")
    paths = [os.fspath(input)] if os.path.exists(input) else sorted(glob.glob(os.fspath(input)))
    if not paths:
        raise FileNotFoundError(f"{input}: no such file")
    schema = _text_schema(paths, text_column, model is not None, words)
    num_rows = sum(pq.read_metadata(path).num_rows for path in paths)
    if num_rows == 0:
        raise ValueError(f"{input} has no rows to embed")
    if isinstance(model, (str, os.PathLike)):
        model = load_text_model(model, device)
    added = {"embedding": pa.list_(pa.float32())} if model is not None else {}
    added |= {"features": pa.list_(pa.string())} if words else {}
    kept = [name for name in schema.names if name not in added]
    written = pa.schema([*map(schema.field, kept), *added.items()], schema.metadata)
    num_null = size = num_features = 0
    with replaced(output) as partial:
        with (
            pq.ParquetWriter(partial, written) as writer,
            tqdm(total=num_rows, desc="embedding", unit="text", disable=not progress) as bar,
        ):
            for path in paths:
                for batch in pq.ParquetFile(path).iter_batches(ROWS_AT_ONCE):
                    columns = {name: batch[name] for name in kept}
                    texts = batch[text_column].to_pylist()
                    num_null += batch[text_column].null_count
                    if model is not None:
                        vectors = embed_texts(texts, model, batch_size, progress=False)
                        size = vectors.shape[1]
                        offsets = np.arange(0, vectors.size + 1, size, dtype=np.int32)
                        columns["embedding"] = pa.ListArray.from_arrays(offsets, vectors.ravel())
                    if words:
                        before = batch["features"].to_pylist() if "features" in batch.schema.names else None
                        columns["features"] = word_features(texts, before)
                        num_features += sum(map(len, columns["features"]))
                    writer.write_table(pa.table(columns).cast(written))
                    bar.update(len(batch))
        if os.path.lexists(output):
            raise FileExistsError(f"another run wrote {output} meanwhile: choose another, or remove it first")
    return {"num_rows": num_rows, "num_null_texts": num_null, "embedding_size": size, "num_features": num_features}


def _text_schema(paths: list[str], text_column: str, embedding: bool, words: bool) -> pa.Schema:
    """The columns of all files, checked: the same in each, with a text column and room for what is added."""
    schemas = {}
    for path in paths:
        try:
            schemas[path] = pq.read_schema(path)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path} is truncated or no parquet file ({error})") from error
    schema = schemas[paths[0]]
    for path, other in schemas.items():
        if not other.equals(schema):
            raise ValueError(f"{path} has other columns than {paths[0]}; embed them apart")
    if text_column not in schema.names:
        raise ValueError(f"{paths[0]} has no column {text_column!r}; it has {', '.join(schema.names)}")
    if embedding and "embedding" in schema.names:
        raise ValueError(f"{paths[0]} has a column 'embedding' already; drop or rename it first")
    if words and "features" in schema.names:
        features = schema.field("features").type
        is_list = pa.types.is_list(features) or pa.types.is_large_list(features)
        if not (pa.types.is_null(features) or (is_list and _is_text(features.value_type))):
            raise ValueError(f"column 'features' of {paths[0]} is {features}; cast it to a list of strings")
    kind = schema.field(text_column).type
    if not is_string(kind.value_type if pa.types.is_dictionary(kind) else kind):
        raise ValueError(f"column {text_column!r} of {paths[0]} is {kind}, not text; cast it to string")
    return schema


def _is_text(kind: pa.DataType) -> bool:
    return is_string(kind) or pa.types.is_null(kind)
