"""What a run shows and keeps of itself."""

from __future__ import annotations

from jaxllm.train.records.run_records import Records

__all__ = ["Records"]
