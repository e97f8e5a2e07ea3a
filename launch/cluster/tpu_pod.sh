#!/usr/bin/env bash
# Trains on a Cloud TPU slice of one or many hosts, and continues after preemptions. `tpu_pod.sh --help` says how.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
# shellcheck source=launch/cluster/common.sh
source "$root/launch/cluster/common.sh"

# Restarts that each come sooner than this after the one before count as failures in a row.
settled_s=600

usage() {
    cat <<'TEXT'
tpu_pod.sh COMMAND --name=NAME --zone=ZONE [FLAGS] [-- FLAGS OF launch/train.py]

Commands
  create    asks for a TPU slice (a queued resource NAME with one node NAME)
  install   copies the commit --ref to all hosts, installs it, mounts the bucket of --workdir
  run       starts launch/train.py on all hosts, in the background; its log is ~/qwenla_jax.run/train.log
  status    the slice's state, and on each host the run's state and the log's last lines
  stop      ends the run on all hosts with SIGTERM: it saves a checkpoint
  resume    all of it, for as long as the run takes: creates the slice where there is none, installs, runs, watches,
            and starts again after preemptions and stalls; ends with status 0 when the run is done
  delete    gives the slice back; the work folder stays

Flags
  --name, --zone       of the slice
  --project            gcloud's own project if not given
  --accelerator_type   create, resume: such as v5litepod-16
  --runtime_version    create, resume: such as v2-alpha-tpuv5-lite
  --spot               create, resume: cheaper, and can be taken away at any time
  --service_account    create, resume: whose rights the hosts have; they must be able to write the bucket
  --workdir            run, resume: gs://BUCKET/PATH, or an absolute path that all hosts share
  --ref                install, resume: the commit to install (HEAD)
  --extra              install, resume: extra of the package to install (tpu)
  --python             install, resume: Python of the virtual environment (3.12)
  --single_host        run, resume: do without jax.distributed
  --poll_s             resume: seconds between two looks (60)
  --attempts           resume: give up after so many failures in a row (5)
  --dry_run            print the commands, run none

A run's folder is on the machine's file system for the trainer, so gs://BUCKET/PATH is mounted with gcsfuse at
/mnt/gcs/BUCKET. The bucket must have been made with folders that can be renamed:
  gcloud storage buckets create gs://BUCKET --location=REGION \
      --uniform-bucket-level-access --enable-hierarchical-namespace
TEXT
}

defaults=(
    [name]="" [zone]="" [project]="" [accelerator_type]="" [runtime_version]="" [service_account]="" [workdir]=""
    [ref]=HEAD [extra]=tpu [python]=3.12 [poll_s]=60 [attempts]=5
)
switches=([spot]=1 [single_host]=1 [dry_run]=1)

# The flags that say where: every gcloud command ends with them.
where() {
    place=(--zone="${flag[zone]}")
    if [[ -n "${flag[project]}" ]]; then place+=(--project="${flag[project]}"); fi
}

on_workers() {
    execute gcloud compute tpus tpu-vm ssh "${flag[name]}" "${place[@]}" --worker=all --command="$1"
}

# What a host is to run, as one line for its shell.
worker_command() { show bash qwenla_jax/launch/cluster/tpu_worker.sh "$@"; }

bucket() {
    local path="${flag[workdir]#gs://}"
    printf '%s' "${path%%/*}"
}

# Where the hosts see the work folder.
remote_workdir() {
    if [[ "${flag[workdir]}" == gs://* ]]; then
        printf '/mnt/gcs/%s' "${flag[workdir]#gs://}"
    else
        printf '%s' "${flag[workdir]}"
    fi
}

check_workdir() {
    local path="${flag[workdir]#gs://}"
    if [[ "${flag[workdir]}" == gs://* && "/${path%/}/" =~ /\.{0,2}/ ]]; then
        fail "--workdir: got '${flag[workdir]}', expected gs://BUCKET/PATH without empty, . or .. parts"
    fi
    [[ "${flag[workdir]}" =~ ^gs://[a-z0-9][a-z0-9._-]+/[^/] || "${flag[workdir]}" == /?* ]] ||
        fail "--workdir: got '${flag[workdir]}', expected gs://BUCKET/PATH or an absolute path that all hosts share"
}

create() {
    local options=()
    if [[ "${flag[spot]}" == true ]]; then options+=(--spot); fi
    if [[ -n "${flag[service_account]}" ]]; then options+=(--service-account="${flag[service_account]}"); fi
    execute gcloud compute tpus queued-resources create "${flag[name]}" "${place[@]}" --node-id="${flag[name]}" \
        --accelerator-type="${flag[accelerator_type]}" --runtime-version="${flag[runtime_version]}" \
        ${options[@]+"${options[@]}"}
}

delete() { execute gcloud compute tpus queued-resources delete "${flag[name]}" "${place[@]}" --force --quiet; }

install() {
    local archive="$root/dist/${flag[name]}.tar.gz" unpack
    if [[ "${flag[dry_run]}" == false && -n "$(git -C "$root" status --porcelain)" ]]; then
        note "what is not committed stays here; ${flag[ref]} is installed"
    fi
    execute mkdir -p "$root/dist" &&
        execute git -C "$root" archive --format=tar.gz --output="$archive" "${flag[ref]}" &&
        execute gcloud compute tpus tpu-vm scp "$archive" "${flag[name]}:qwenla_jax.tar.gz" "${place[@]}" --worker=all ||
        return
    unpack="rm -rf qwenla_jax.new && mkdir qwenla_jax.new && tar -xzf qwenla_jax.tar.gz -C qwenla_jax.new"
    unpack+=" && $(show bash qwenla_jax.new/launch/cluster/tpu_worker.sh install "${flag[extra]}" "${flag[python]}")"
    on_workers "$unpack"
}

run() {
    local command arguments=()
    if [[ "${flag[single_host]}" == false ]]; then arguments+=(--distributed); fi
    command="$(worker_command start ${arguments[@]+"${arguments[@]}"} --workdir="$(remote_workdir)" "${trainer[@]}")"
    # A host that was restarted has lost its mount; one that has it mounts nothing.
    if [[ "${flag[workdir]}" == gs://* ]]; then command="$(worker_command mount "$(bucket)") && $command"; fi
    on_workers "$command"
}

install_and_run() { install && run; }

stop_and_run() { stop && run; }

stop() { on_workers "$(worker_command stop)"; }

look() {
    execute gcloud compute tpus queued-resources describe "${flag[name]}" "${place[@]}" --format='value(state.state)'
}

look_at_node() {
    execute gcloud compute tpus tpu-vm describe "${flag[name]}" "${place[@]}" --format='value(state)'
}

look_at_workers() {
    on_workers "if [ -f qwenla_jax/launch/cluster/tpu_worker.sh ]; then $(worker_command status); else echo qwenla_jax absent; fi"
}

# Runs a command that is repeated all the time: what it says on standard error is shown only where it fails.
quietly() {
    local status=0
    "$@" 2>"$errors" || status=$?
    if ((status)); then grep -v '^+ ' "$errors" >&2 || true; fi
    return "$status"
}

# What a command of gcloud tells: its answer, "none" where gcloud knows no such thing, "unknown" where it failed.
ask() {
    local answer
    if answer="$("$@" 2>"$errors")"; then
        printf '%s\n' "${answer:-unknown}"
    elif grep -v '^+ ' "$errors" | grep -qiE 'not[ _]?found'; then
        printf 'none\n'
    else
        grep -v '^+ ' "$errors" >&2 || true
        printf 'unknown\n'
    fi
}

# The slice: ready, waiting, lost (gone, or will never come), none or unknown; then gcloud's own word.
slice_state() {
    local request node
    request="$(ask look)"
    case "$request" in
        none | unknown) printf '%s %s\n' "$request" "$request" ;;
        ACTIVE)
            node="$(ask look_at_node)"
            case "$node" in
                READY) printf 'ready READY\n' ;;
                unknown) printf 'unknown unknown\n' ;;
                PREEMPTED | TERMINATED | STOPPED | none) printf 'lost %s\n' "$node" ;;
                *) printf 'waiting %s\n' "$node" ;;
            esac
            ;;
        SUSPENDED | FAILED) printf 'lost %s\n' "$request" ;;
        *) printf 'waiting %s\n' "$request" ;;
    esac
}

# The run on all hosts: running, done, absent, idle, ended (some ended badly), mixed (some run, some ended badly), unknown.
run_state() {
    local answer states
    if ! answer="$(quietly look_at_workers)"; then
        printf 'unknown\n'
        return
    fi
    states="$(grep -oE '^qwenla_jax (absent|idle|running|lost|ended [0-9]+)' <<<"$answer" | sort -u | cut -d ' ' -f 2-)"
    case "$states" in
        "") printf 'unknown\n' ;;
        "ended 0") printf 'done\n' ;;
        *absent*) printf 'absent\n' ;;
        idle) printf 'idle\n' ;;
        running | $'ended 0\nrunning') printf 'running\n' ;; # the first host still writes when the others are done
        *running*) printf 'mixed\n' ;;
        *) printf 'ended %s\n' "$(tr '\n' ' ' <<<"$states")" ;;
    esac
}

resume() {
    local state word failures=0 mixed=0 started=-1 before=""
    if [[ "${flag[dry_run]}" == true ]]; then
        plan
        return
    fi
    errors="$(mktemp)"
    trap 'rm -f "$errors"' EXIT
    # fault REASON: one more failure in a row.
    fault() {
        failures=$((failures + 1))
        note "$1 (failure $failures of ${flag[attempts]})"
        if ((failures >= flag[attempts])); then
            note "giving up; see: tpu_pod.sh status"
            exit 1
        fi
    }
    # again REASON COMMAND...: starts the run. One that ended soon after its start counts as a failure.
    again() {
        note "$1"
        if ((started >= 0)); then fault "the run was started less than $settled_s s ago"; fi
        started=$SECONDS
        if ! "${@:2}"; then
            fault "starting failed"
            started=-1
        fi
    }
    while true; do
        read -r state word < <(slice_state)
        if [[ "$state" == ready ]]; then word="$(run_state)"; fi
        if [[ "$state $word" != "$before" ]]; then note "slice $state: $word"; fi
        before="$state $word"
        if ((started >= 0 && SECONDS - started >= settled_s)); then failures=0 started=-1; fi
        case "$state" in
            none) create || fault "the slice cannot be asked for" ;;
            lost)
                if [[ "$word" == FAILED ]]; then fault "the request for the slice failed"; fi
                { delete && create; } || fault "the slice cannot be made again"
                started=-1
                ;;
            unknown) fault "gcloud does not tell the slice's state" ;;
            ready)
                [[ "$word" == mixed ]] && mixed=$((mixed + 1)) || mixed=0
                case "$word" in
                    done)
                        note "the run is done: ${flag[workdir]}"
                        return
                        ;;
                    absent) again "new hosts" install_and_run ;;
                    idle) again "nothing runs yet" install_and_run ;;
                    ended*) again "the run ended ($word)" run ;;
                    # A host ended and the others wait for it: they are given one look's time to find out by themselves.
                    mixed) if ((mixed > 1)); then again "the run ended on some hosts" stop_and_run; fi ;;
                    unknown) fault "the hosts do not answer" ;;
                esac
                ;;
        esac
        sleep "${flag[poll_s]}"
    done
}

plan() {
    remark "every ${flag[poll_s]} s: is the slice there, and what does the run do"
    look
    look_at_node
    look_at_workers
    remark "where the slice is gone (SUSPENDED, FAILED, PREEMPTED, TERMINATED, STOPPED)"
    delete
    remark "where there is none"
    create
    remark "where the hosts are new"
    install
    remark "there, and where the run has ended with another status than 0"
    run
    remark "before that, where it has ended on some hosts only"
    stop
}

command="${1:-}"
case "$command" in
    -h | --help)
        usage
        exit 0
        ;;
    create | install | run | status | stop | resume | delete) shift ;;
    *) fail "unknown command '$command'; valid: create, install, run, status, stop, resume, delete (--help says more)" ;;
esac
parse_flags "$@"
need name zone
[[ "${flag[name]}" =~ ^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$ ]] ||
    fail "--name: got '${flag[name]}', expected small letters, digits and hyphens, a letter first"
plain ref '^[^-]' 'a commit'
plain extra '^[a-z0-9_-]+(,[a-z0-9_-]+)*$' 'names of extras, such as tpu or tpu,demo'
plain python '^[0-9]+(\.[0-9]+)*$' 'a version, such as 3.12'
number poll_s 0
number attempts 1
where
case "$command" in create | resume) need accelerator_type runtime_version ;; esac
case "$command" in
    run | resume)
        need workdir
        check_workdir
        check_trainer
        ;;
    *) ((${#trainer[@]} == 0)) || fail "$command takes no flags of the training, got '${trainer[0]}'" ;;
esac
case "$command" in
    status)
        look
        look_at_node
        look_at_workers
        ;;
    *) "$command" ;;
esac
