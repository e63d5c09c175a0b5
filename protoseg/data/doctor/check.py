"""The doctor: reads every file of a dataset in parallel and reports what training would stumble over."""

from collections.abc import Callable

from protoseg.config import DataConfig
from protoseg.data.datasets import data_root, dataset_spec, find_split, image_reader, label_ids
from protoseg.data.doctor.class_table import class_table
from protoseg.data.doctor.diagnosis import (
    diagnose,
    diagnose_classes,
    diagnose_pairing,
    diagnose_turned,
    diagnose_values,
    measured_range,
)
from protoseg.data.doctor.facts import read_facts
from protoseg.data.doctor.label_map_advice import advise_label_map, id_table
from protoseg.data.doctor.report import DataReport
from protoseg.data.reading.pairing import pair_files
from protoseg.data.reading.text_lists import read_excluded
from protoseg.runtime.errors import UserError


def check_dataset(
    data: DataConfig, *, threads: int = 4, on_progress: Callable[[int, int], None] | None = None
) -> DataReport:
    """Reads every image and label of the training and validation splits and reports all faults at once.

    `on_progress(done, total)` is called after each pair of files. Raises UserError only where nothing can be
    read: unknown dataset, missing root or split.
    """
    if data.name == "digits":
        raise UserError("data.name: digits is composed on the fly and has no files to check")
    spec, root = dataset_spec(data), data_root(data)
    ids = label_ids(spec)
    excluded = read_excluded(data.exclude, root)
    training = data.train_split.split("+")
    splits = dict.fromkeys([*training, *data.val_split.split("+")])
    pairings = {split: pair_files(root, find_split(data, split), spec.homepage, excluded) for split in splits}
    pairs = [(split, *pair) for split, pairing in pairings.items() for pair in pairing.pairs.values()]
    facts = read_facts(root, image_reader(data), spec.read_ids, pairs, threads, on_progress)
    trained_on = [f for f in facts if f.split in training]
    id_rows = id_table(facts, ids, spec.label_names)
    advice = advise_label_map(id_rows, ids, len(spec.classes))
    rows, ignored = class_table(trained_on, ids, spec.label_names)
    rows = [row for i, row in enumerate(rows) if i < len(spec.classes) or row.pixels]
    findings = [
        *diagnose_pairing(root, pairings),
        *diagnose(facts, ids, spec.classes, spec.colours),
        *diagnose_turned(facts, data.exif == "apply"),
        *diagnose_values(facts, trained_on, image_reader(data).value_range),
        *diagnose_classes(rows, data.train_split, any(f.id_counts for f in trained_on)),
    ]
    bad = {name for finding in findings if finding.severity == "error" for name in finding.files}
    return DataReport(
        dataset=data.name,
        root=str(root),
        images={split: len(pairing.pairs) for split, pairing in pairings.items()},
        findings=sorted(findings, key=lambda finding: finding.severity),  # errors first
        classes=rows,
        ignored_share=ignored / max(1, ignored + sum(row.pixels for row in rows)),
        value_range=image_reader(data).value_range or measured_range(trained_on),
        ids=id_rows if any(row.meaning == "?" for row in id_rows) or advice else [],
        advised_label_map=advice.label_map if advice else None,
        advice_ignores=advice.ignored_share if advice else 0.0,
        bad_files=sorted(name for name in bad if (root / name).is_file()),  # not what a list only names
    )
