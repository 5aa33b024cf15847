"""What the launchers of these tests start: a rank that does what its first argument says."""

import os
import sys

exec(  # a test's own words
    sys.argv[1],
    {
        "rank": int(os.environ.get("RANK", "0")),
        "local": int(os.environ.get("LOCAL_RANK", "0")),
        "world": int(os.environ.get("WORLD_SIZE", "1")),
        "folder": sys.argv[2],
    },
)
