#!/bin/sh
# Builds docker/Dockerfile and uses the image on the CPU, without an engine and without a registry of images: buildah, on a
# Debian base with torch 2.11.0 from pip.  Needs root, Linux, buildah, debootstrap, 25 GB under TMPDIR and 5 minutes or more.
# Options are those that `buildah run` and `buildah build` share, such as -v /etc/pip.conf:/etc/pip.conf:ro.
set -eu
cd "$(dirname "$0")/.."
work=$(mktemp -d)
mkdir -m 777 "$work/results"
export BUILDAH_ISOLATION=chroot STORAGE_DRIVER=vfs
b() { buildah --root "$work/storage" --runroot "$work/runroot" "$@"; }
trap 'b rm -a > /dev/null 2>&1; rm -rf "$work"' EXIT

base=$(b from scratch)
debootstrap --variant=minbase --include=python3,python3-pip,ca-certificates bookworm "$(b mount "$base")" > "$work/log" ||
    { tail "$work/log"; exit 1; }
b config --env PATH=/usr/local/bin:/usr/bin:/bin "$base"
b run "$@" "$base" -- python3 -m pip install -q --no-cache-dir --break-system-packages torch==2.11.0 torchvision==0.26.0
b commit -q --rm "$base" localhost/base
b build "$@" -f docker/Dockerfile --build-arg BASE=localhost/base --build-arg COMMIT=c0ffee -t metasemi .
b rmi -f localhost/base > /dev/null

image=$(b from metasemi)
entry=$(b inspect --format '{{index .OCIv1.Config.Entrypoint 0}}' "$image")
user=1000:1000
start() { b run --user $user -v "$work/results:/workspace/results" "$image" -- "$@"; }
digits="train_meta.py --dataset digits --num-label 50 -a convsmall --batch-size 8 --warmup 2 --test-freq 2"
for user in 1000:1000 4321:4321; do
    start "$entry" $digits --total-steps 2 --save-path results/$user
    start "$entry" plot_features.py --checkpoint-path results/$user/checkpoint.pth --num-point 100 --save-path results/figure-$user
    test "$(stat -c %u:%g "$work/results/$user/checkpoint.pth" "$work/results/figure-$user/features.png" | uniq)" = $user
    grep -q '"commit": "c0ffee"' "$work/results/$user/args.json"
    if start sh -c 'echo >> train_meta.py' 2> /dev/null; then echo "user $user can change the code"; exit 1; fi
done

start "$entry" $digits --total-steps 100000 --save-path results/stopped &
until [ -e "$work/results/stopped/checkpoint.pth" ]; do kill -0 $!; sleep 1; done
kill -TERM "$(cat "$work/results/stopped/.lock")"
code=0; wait $! || code=$?
test $code = 143
echo "docker/try_build.sh: all is well"
