"""Records and examples of small data in lists, by the same classes as a run's."""

from dora_mlx.data.records import RecordReader
from dora_mlx.data.report import Report
from dora_mlx.data.tokenized import SourceWriter
from dora_mlx.data.tokenizing import ExampleMaker


def read_records(source, form="auto", columns=()):
    """All records of a source; raises what is wrong with it."""
    reader = RecordReader(source, form, columns)
    records = list(reader)
    reader.report.raise_errors()
    return records


def make_examples(records, tokenizer, max_seq_length, **options):
    """The ``ExampleSet`` of records; raises what the template says against them."""
    report = Report(records[0].path)
    writer = SourceWriter(None)
    for made in ExampleMaker(tokenizer, max_seq_length, **options).make(records, report):
        writer.append(*made)
    report.raise_errors()
    return writer.finish(report).all()
