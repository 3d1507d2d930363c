"""A params file, and in SMALL_NUMBERS the blocks of small numbers as JSON -> the file with these numbers."""

import json
import os
import sys
from pathlib import Path

from ruamel.yaml import YAML

yaml = YAML(typ="safe")
path = Path(sys.argv[1])
tree = yaml.load(path)
for block, values in json.loads(os.environ["SMALL_NUMBERS"]).items():
    tree[block].update(values)
yaml.dump(tree, path)
