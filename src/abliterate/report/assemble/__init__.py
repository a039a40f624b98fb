"""Results as they stand in the record, and the record of every command."""

from abliterate.files.checkpoint import FRONT
from abliterate.report.assemble.build import (
    anatomy_part,
    build_record,
    check_beside,
    check_results,
    files_below,
    model_part,
    separation_part,
    session_model,
    session_record,
    source_hashes,
    with_hashes,
    write_all,
    write_beside,
    write_record_and_report,
    written_parts,
)
from abliterate.report.assemble.search import point_file, save_points, search_part, with_origin_of

__all__ = [
    "FRONT",
    "anatomy_part",
    "build_record",
    "check_beside",
    "check_results",
    "files_below",
    "model_part",
    "point_file",
    "save_points",
    "search_part",
    "separation_part",
    "session_model",
    "session_record",
    "source_hashes",
    "with_hashes",
    "with_origin_of",
    "write_all",
    "write_beside",
    "write_record_and_report",
    "written_parts",
]
