#!/bin/bash
# The tests of Kubernetes' storage, as programs that start the store that STORE names: build.sh FOLDER
# makes FOLDER/etcd3.test and FOLDER/cacher.test. With Go and golang-k8s-apiserver-dev (0.33 or later)
# installed, it uses them. Otherwise it installs Debian unstable with both into a temporary folder,
# which takes root, mmdebstrap, Debian's packages, 3 GB and ten minutes.
. "$(dirname "$0")/../debian_build.sh"
build unstable golang-k8s-apiserver-dev,golang-github-fxamacker-cbor-dev \
    'type go && [ -d /usr/share/gocode/src/k8s.io/apiserver/pkg/storage/cacher/store ]' \
    test_server.go leader_test.go <<'END'
storage=/usr/share/gocode/src/k8s.io/apiserver/pkg/storage
printf '{"Replace": {"%s": "%s", "%s": "%s"}}' \
    $storage/etcd3/testserver/test_server.go "$own/test_server.go" \
    $storage/etcd3/leader_test.go "$own/leader_test.go" > "$work/overlay.json"
for package in etcd3 cacher; do
    go test -c -vet=off -overlay "$work/overlay.json" -o "$made/$package.test" \
        k8s.io/apiserver/pkg/storage/$package
done
END
