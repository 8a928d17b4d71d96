# SPDX-License-Identifier: BSD-3-Clause
"""Runs of `finetune` that several tests of training methods need."""

import pytest

import skfactor


def files_of_two_runs(make, data, folder, **options):
    """Bytes of the files of two methods from `make`, trained alike."""
    files = []
    for i in range(2):
        method = make()
        skfactor.finetune(method, data, progress=False, **options)
        files.append(method.finish().save(folder / f"run{i}.skf").read_bytes())
    return files


def whole_and_resumed(make, data, folder, stop_after, **options):
    """A method from `make` after all epochs, and one that was interrupted and went on from its checkpoint."""
    whole, broken, again = make(), make(), make()
    skfactor.finetune(whole, data, progress=False, **options)

    def stop(record):
        if record["epoch"] == stop_after:
            raise KeyboardInterrupt

    options |= {"checkpoint": folder / "state", "progress": False}
    with pytest.raises(KeyboardInterrupt):
        skfactor.finetune(broken, data, callback=stop, **options)
    skfactor.finetune(again, data, **options)
    return whole, again
