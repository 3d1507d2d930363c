#!/bin/sh
# DVC runs every command of a stage as `$SHELL -c COMMAND`, and exits with 255 whatever the command's own exit code was.
# As $SHELL, this script runs the command and writes its exit code to a file, which also shows that DVC ran the stage.
/bin/sh "$@"
code=$?
echo "$code" >"$ESPALIER_EXIT_CODE_FILE"
exit "$code"
