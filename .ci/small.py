#!/usr/bin/env python3
"""Be the server, but with sizes so small that all of the storage's work is done all the time.

    python3 .ci/small.py -c config.json              # else as micro_queue.py

Segments change after some messages, are cleaned and removed, snapshots are written several
times a second: what a server of the real sizes does once an hour. The harnesses start it so.
"""
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import micro_queue as mq  # noqa: E402

KIB = 1 << 10
SIZES = {"SEGMENT_BYTES": 48 * KIB, "READY_BYTES": 8 * KIB, "DEAD_BYTES": 64 * KIB,
         "DEAD_LOW_BYTES": 8 * KIB, "SEGMENTS_MOST": 20, "MARKS_BYTES": 8 * KIB,
         "SNAPSHOT_DATA_BYTES": 96 * KIB, "AHEAD_BYTES": 2 * KIB, "LOG_CHUNK_BYTES": 8 * KIB,
         "SLICE_BYTES": 4 * KIB, "SLICE_MESSAGES": 8,
         "TRUNCATE_BYTES": 16 * KIB, "PASSED_OVER": 200,
         "UPKEEP_S": 0.02, "FREE_REST_S": 0.002, "FREE_WORK_REST_S": 0.001}


def make_small() -> None:
    for name, size in SIZES.items():
        getattr(mq, name)                    # one that is no longer there would change nothing
        setattr(mq, name, size)


if __name__ == "__main__":
    make_small()
    sys.exit(mq.main())
