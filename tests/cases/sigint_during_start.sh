#!/bin/bash
# A signal during start must not give a Python traceback.
# CTL=etcdlite-ctl ETCDLITE=etcdlite bash sigint_during_start.sh
CTL=${CTL:-etcdlite-ctl}; ETCDLITE=${ETCDLITE:-etcdlite}; bad=0
for d in .005 .01 .015 .02 .03 .05 .08 .12 .16 .2 .25 .3; do
  for c in "$CTL --endpoints 127.0.0.1:1 version" "$ETCDLITE --check-config"; do
    e=$(timeout -s INT $d $c 2>&1 >/dev/null)
    if grep -q Traceback <<<"$e"; then
      echo "FAULT: SIGINT after ${d}s: $c: $(wc -l <<<"$e") lines, $e"; bad=1
    fi
  done
done
[ $bad = 0 ] && echo RIGHT; exit $bad
