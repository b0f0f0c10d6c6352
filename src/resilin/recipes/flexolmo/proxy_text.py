"""Public text that looks like an owner's, found by a classifier: what the joined router is tuned on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from resilin.config import component
from resilin.data.packed import PackedSettings, PackedSource
from resilin.data.settings import SourceContext, SourceSettings
from resilin.joined.domain import Domain, document_vectors
from resilin.joined.proxies import proxies
from resilin.recipes.byte_text import byte_document, byte_shards
from resilin.recipes.flexolmo.owners import texts_of


class Proxies(PackedSettings):
    """The public rows that are most like an owner's, one token a byte."""

    own: Annotated[SourceSettings, component("resilin.recipes.installed_text:InstalledText")]
    """The owner's data."""
    public: Annotated[SourceSettings, component("resilin.recipes.standard_library:StandardLibrary")]
    """Where proxies are looked for."""
    pool: Annotated[int, Field(gt=0)] = 4096
    """Public rows that are looked at."""
    count: Annotated[int, Field(gt=0)] = 256
    """Proxies."""
    cache: Path = Path(".data")
    """Where their token shards are kept; they are written once."""

    def build(self, context: SourceContext) -> PackedSource:
        """The source of one split; the shards are made on first use."""
        digests = [
            str(getattr(one.build(SourceContext(0, "train", 1)), "digest", "")) for one in (self.own, self.public)
        ]
        text = json.dumps([*digests, self.pool, self.count])
        target = self.cache / f"proxies-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        return self.packed(byte_shards(target, map(byte_document, self._found())), context)

    def _found(self) -> list[np.ndarray[tuple[int], np.dtype[np.uint8]]]:
        pool, domain = texts_of(self.public, self.pool), Domain(kind="ngrams")
        own, public = (document_vectors(domain, texts, None, None, 128) for texts in (texts_of(self.own), pool))
        chosen = [pool[number] for number in proxies(own, public, self.count)]
        return [np.frombuffer(text.encode(), np.uint8) for text in chosen]
