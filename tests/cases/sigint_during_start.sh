#!/bin/bash
# A signal during start must not give a Python traceback. Python gives one itself in the first
# milliseconds, before etcdlite can act (etcdlite/interrupts.py): it names at most three of our files.
# CTL=etcdlite-ctl ETCDLITE=etcdlite bash sigint_during_start.sh
CTL=${CTL:-etcdlite-ctl}; ETCDLITE=${ETCDLITE:-etcdlite}; bad=0
for d in .02 .05 .08 .12 .16 .2 .25 .3; do
  for c in "$CTL --endpoints 127.0.0.1:1 version" "$ETCDLITE --check-config"; do
    e=$(timeout -s INT $d $c 2>&1 >/dev/null)
    if grep 'File ".*etcdlite/' <<<"$e" | grep -qv 'etcdlite/\(__init__\|start\|interrupts\)\.py'; then
      echo "FAULT: SIGINT after ${d}s: $c: $(wc -l <<<"$e") lines, $e"; bad=1
    fi
  done
done
[ $bad = 0 ] && echo RIGHT; exit $bad
