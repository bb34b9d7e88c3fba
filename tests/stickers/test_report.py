"""The demo's page shows texts from outside as text."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rebeca_ray.stickers import report
from rebeca_ray.stickers.report import ShownUser, write_report
from rebeca_ray.stickers.truth import TruthCheck


def test_a_hostile_user_is_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hostile = "<img src=x onerror=alert(1)>"
    user = ShownUser(user_id=hostile, num_likes=1, liked=["data:image/webp;base64,a+/="], generated=[])
    monkeypatch.setattr(report, "shown_users", lambda *_: [user])
    (tmp_path / "training.csv").write_text("epoch,train_loss,val_loss\n1,1.0,0.9\n")
    anything: Any = SimpleNamespace(
        manifest=SimpleNamespace(
            counts=SimpleNamespace(new=1, users=1), run_id=hostile, run_date="2026-03-01", versions={}
        ),
        accuracy_line=hostile,
    )
    page = write_report(
        tmp_path,
        prior=tmp_path,
        snapshot=anything,
        interactions=anything,
        check=TruthCheck(
            matched=0.5,
            shuffled=0.5,
            random_real=0.5,
            no_user=0.5,
            held_out=0.5,
            retrieved=0.5,
            retrieved_with_mmr=0.5,
        ),
        judge=anything,
        phases={hostile: 1.0},
    ).read_text()
    assert "onerror=alert(1)&gt;" in page
    assert "<img src=x" not in page
    assert 'src="data:image/webp;base64,a+/="' in page
