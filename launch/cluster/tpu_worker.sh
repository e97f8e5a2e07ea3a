#!/usr/bin/env bash
# What launch/cluster/tpu_pod.sh runs on every host of a TPU slice, over ssh:
#
#   tpu_worker.sh install EXTRA PYTHON   puts the unpacked checkout in its place and installs it
#   tpu_worker.sh mount BUCKET           mounts a Cloud Storage bucket at /mnt/gcs/BUCKET
#   tpu_worker.sh start ARGUMENT...      starts launch/train.py in the background
#   tpu_worker.sh status                 one line "qwenla_jax STATE", and the log's last lines
#   tpu_worker.sh stop                   SIGTERM, at which a run saves; SIGKILL where it has not ended after a while
#
# STATE is running, "ended STATUS", lost (it was started, and the host has forgotten why it ended) or idle.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
checkout="$HOME/qwenla_jax"
venv="$HOME/qwenla_jax.venv"
run="$HOME/qwenla_jax.run" # pid, status and log; not in the checkout, which an installation replaces
mounts="${QWENLA_JAX_MOUNTS:-/mnt/gcs}"
patience_s="${QWENLA_JAX_STOP_S:-600}"

fail() {
    printf 'tpu_worker.sh: %s: %s\n' "$(hostname)" "$1" >&2
    exit "${2:-1}"
}

# The process of the training, if it lives. After a reboot its number may be another program's.
process() {
    local pid
    [[ -s "$run/pid" ]] || return 1
    pid="$(<"$run/pid")"
    kill -0 "$pid" 2>/dev/null && tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null | grep -q 'launch/train\.py' || return 1
    printf '%s\n' "$pid"
}

install() {
    local extra="$1" version="$2" uv
    if process >/dev/null; then fail "a run is continuing; stop it first" 3; fi
    uv="$(command -v uv || true)"
    if [[ -z "$uv" ]]; then
        uv="$HOME/.local/bin/uv"
        # The Python of TPU images may be older than the package allows; uv brings another one.
        [[ -x "$uv" ]] || curl -LsSf https://astral.sh/uv/install.sh | sh
    fi
    [[ -x "$venv/bin/python" ]] || "$uv" venv --python "$version" "$venv"
    "$uv" pip install --python "$venv/bin/python" "${here}[$extra]"
    if [[ "$here" != "$checkout" ]]; then
        rm -rf "$checkout"
        mv "$here" "$checkout"
    fi
    printf 'qwenla_jax installed\n'
}

install_gcsfuse() {
    local key=/usr/share/keyrings/cloud.google.asc
    curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" >/dev/null
    printf 'deb [signed-by=%s] https://packages.cloud.google.com/apt gcsfuse-%s main\n' "$key" "$(lsb_release -cs)" |
        sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    sudo apt-get update -qq
    sudo apt-get install -y -qq gcsfuse
}

mount_bucket() {
    local folder="$mounts/$1" probe
    [[ "$1" =~ ^[a-z0-9][a-z0-9._-]+$ ]] || fail "'$1' is no name of a bucket" 2
    if ! mountpoint -q "$folder"; then
        command -v gcsfuse >/dev/null || install_gcsfuse
        sudo mkdir -p "$folder"
        sudo chown "$(id -u):$(id -g)" "$folder"
        gcsfuse --implicit-dirs "$1" "$folder"
    fi
    # Checkpoints are written under another name and renamed. A bucket without folders cannot do that.
    probe="$(mktemp -d "$folder/.qwenla_jax.XXXXXX")" || fail "gs://$1 cannot be written from here"
    mkdir "$probe/a"
    : >"$probe/a/file"
    if ! mv -T "$probe/a" "$probe/b"; then
        rm -rf "$probe"
        fail "folders in gs://$1 cannot be renamed; it takes a bucket made with --enable-hierarchical-namespace"
    fi
    rm -rf "$probe"
}

start() {
    local pid waited=0
    if pid="$(process)"; then fail "a run is continuing already, process $pid" 3; fi
    [[ -x "$venv/bin/python" && -f "$checkout/launch/train.py" ]] || fail "not installed; run: tpu_pod.sh install"
    mkdir -p "$run"
    rm -f "$run/pid" "$run/status"
    # A session of its own: the training outlives the connection that started it.
    setsid bash "$checkout/launch/cluster/tpu_worker.sh" supervise "$@" >>"$run/train.log" 2>&1 </dev/null &
    until [[ -s "$run/pid" ]]; do
        ((waited++ < 100)) || fail "the training did not start; see $run/train.log"
        sleep 0.1
    done
    printf 'qwenla_jax started\n'
}

supervise() {
    local status=0
    cd "$checkout"
    "$venv/bin/python" launch/train.py "$@" &
    printf '%s\n' "$!" >"$run/pid"
    wait "$!" || status=$?
    printf '%s\n' "$status" >"$run/status.new"
    mv "$run/status.new" "$run/status"
}

status() {
    # Between a training's end and the note of its status lies a moment.
    if [[ -s "$run/pid" && ! -s "$run/status" ]] && ! process >/dev/null; then sleep 1; fi
    if process >/dev/null; then
        printf 'qwenla_jax running\n'
    elif [[ -s "$run/status" ]]; then
        printf 'qwenla_jax ended %s\n' "$(<"$run/status")"
    elif [[ -s "$run/pid" ]]; then
        printf 'qwenla_jax lost\n'
    else
        printf 'qwenla_jax idle\n'
    fi
    if [[ -s "$run/train.log" ]]; then tail -n 3 "$run/train.log" | sed 's/^/    /'; fi
}

stop() {
    local pid waited=0
    if ! pid="$(process)"; then
        printf 'qwenla_jax idle\n'
        return
    fi
    kill -TERM "$pid" # once: the second one would end the run without its checkpoint
    while process >/dev/null; do
        if ((waited++ >= patience_s)); then
            kill -KILL "$pid" 2>/dev/null || true
            break
        fi
        sleep 1
    done
    printf 'qwenla_jax stopped\n'
}

command="${1:-}"
(($#)) && shift
case "$command" in
    install | start | supervise | status | stop) "$command" "$@" ;;
    mount) mount_bucket "$@" ;;
    *) fail "unknown command '$command'; valid: install, mount, start, status, stop" 2 ;;
esac
