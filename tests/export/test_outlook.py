"""What is told before a run about sets that cannot be exported."""

from __future__ import annotations

import transformers as tf

from lpserve.cli.entry import main
from lpserve.export.outlook import export_outlook
from lpserve.model.checkpoint import read_checkpoint
from lpserve.testing.checkpoints import TEXT, gemma_3n_config, save_random
from tests.conftest import SEED


def test_a_model_of_which_every_set_can_be_exported_needs_no_note(model_dir):
    assert export_outlook(read_checkpoint(model_dir("llama"))) == []


def test_a_model_of_which_none_can_says_why(tmp_path):
    save_random(gemma_3n_config(), tmp_path / "model", SEED)
    (note,) = export_outlook(read_checkpoint(tmp_path / "model"))
    assert note.startswith("no set that was tried can be exported: ")
    assert "a part for each layer" in note


def test_a_layer_that_cannot_go_is_told_before_the_run(tmp_path, capsys, no_engine):
    config = tf.RwkvConfig(
        vocab_size=97,
        hidden_size=32,
        attention_hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=TEXT["num_hidden_layers"],
    )
    save_random(config, tmp_path / "model", SEED)
    text = tmp_path / "t.txt"
    text.write_text("words " * 400)
    flags = ["--model", str(tmp_path / "model"), "--calibration", str(text)]
    # the model has no tokenizer: that is refused next
    assert main(["run", *flags, "--out", str(tmp_path / "run")]) == 2
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1
    assert "a set that removes layer 0 cannot be exported" in notes[0]
    assert "layer 1 cannot stand at position 0" in notes[0]
