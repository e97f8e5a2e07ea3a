#!/usr/bin/env bash
# Runs four benchmark harnesses, unmodified, against `qwenla serve`, and checks every answer and every score.
#
#     bash tests/serve/harnesses/run.sh WORK VLMEVALKIT [HARNESS ...]
#
# WORK gets the environments (14 GB with all four), the data, the requests and the harnesses' outputs. VLMEVALKIT is a
# checkout of open-compass/VLMEvalKit at e8e78f05. HARNESS is inspect, lm-eval, lmms-eval or vlmevalkit; all without one.
#
# PYTHON     of the project (default: python)
# SIZE       questions of each benchmark (default: 16)
# MATHVISION folder with MathVision's test.jsonl and images/, of which SIZE questions are asked too (default: none)
# PORT       of the server; the next one is the recorder's (default: 8901)
set -euo pipefail

work=$(realpath -m "$1") kit=$(realpath -m "$2")
shift 2
[ $# -gt 0 ] || set -- inspect lm-eval lmms-eval vlmevalkit
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export PYTHONPATH=$here/../../..
python=${PYTHON:-python} size=${SIZE:-16} port=${PORT:-8901} key=sk-of-the-check
url=http://127.0.0.1:$((port + 1))
export HF_HOME=$work/hf
mkdir -p "$work/out" "$work/log"

# install NAME PACKAGES...: an environment, once.
install() {
  local env=$work/v_$1
  shift
  [ -e "$env/done" ] && return
  python3.11 -m venv "$env"
  "$env/bin/pip" install --quiet "$@"
  touch "$env/done"
}

# step NAME COMMAND...: a run of a harness; its output goes to WORK/log/NAME.log. What was kept of it before goes.
step() {
  local name=$1 code=0
  shift
  rm -rf "$work/requests/$name.jsonl" "$work/out/$name"
  echo "$name"
  env -u PYTHONPATH "$@" > "$work/log/$name.log" 2>&1 || code=$?
  [ $code = 0 ] || { tail -20 "$work/log/$name.log"; echo "$name: it ended with $code"; exit 1; }
}

inspect() {
  install inspect inspect-ai==0.3.285 openai==3.57.0
  cd "$here"
  step inspect env QWENLA_BASE_URL="$url/inspect/v1" QWENLA_API_KEY=$key PYTHONDONTWRITEBYTECODE=1 \
    "$work/v_inspect/bin/inspect" eval inspect_task.py -T "data=$work/data" --model openai-api/qwenla/qwenla \
    --log-dir "$work/out/inspect" --log-format json --display plain
}

lm-eval() {
  install lm-eval 'lm-eval[api]==0.4.13' pillow
  cd "$work/data/parquet"
  step lm-eval env OPENAI_API_KEY=$key HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 \
    "$work/v_lm-eval/bin/lm_eval" --model local-chat-completions --model_args \
    "model=qwenla,base_url=$url/lm-eval/v1/chat/completions,max_images=1,tokenized_requests=False" \
    --tasks pope_local,mathvision_local --include_path "$here/lm_eval_tasks" --apply_chat_template --log_samples \
    --output_path "$work/out/lm-eval"
}

lmms-eval() {
  install lmms-eval lmms-eval==0.7.3 'filelock<4'
  cd "$work/data/parquet"
  for run in "openai pope,mathvision_test" "async_openai pope"; do
    read -r backend tasks <<< "$run"
    step "lmms-eval-$backend" env OPENAI_API_KEY=$key HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 \
      "$work/v_lmms-eval/bin/lmms-eval" --model "$backend" \
      --model_args "model=qwenla,base_url=$url/lmms-eval-$backend/v1" --tasks "$tasks" --batch_size 1 \
      --gen_kwargs max_new_tokens=128 --log_samples --output_path "$work/out/lmms-eval-$backend"
  done
}

# kit_run NAME ARGUMENTS...: VLMEvalKit's run.py.
kit_run() {
  local name=$1
  shift
  step "$name" env PYTHONPATH="$kit" PYTHONDONTWRITEBYTECODE=1 LMUData="$work/data/lmu" HF_HUB_OFFLINE=1 \
    "$work/v_vlmevalkit/bin/python" "$kit/run.py" --api-nproc 32 --retry 2 --work-dir "$work/out/$name" "$@"
}

vlmevalkit() {
  install vlmevalkit -r "$kit/requirements.txt" rouge_score
  mkdir -p "$work/kit"
  cd "$work/kit"
  # Its default of 32,768 tokens, for questions with short answers.
  kit_run vlmevalkit-pope --model qwenla --base-url "$url/vlmevalkit-pope/v1" --key $key --judge exact_matching \
    --data POPE_local --data-config '{"POPE_local": {"class": "ImageYORNDataset", "dataset": "POPE_local"}}'
  # Lettered options and two images in a text; sampled and streamed; its class for GPT-4V with a detail and a system turn.
  local end="/v1/chat/completions" common="\"key\": \"$key\", \"max_tokens\": 128, \"retry\": 2, \"timeout\": 600"
  cat > "$work/kit/config.json" << END
{"model": {
  "greedy": {"class": "LMDeployAPI", "model": "qwenla", "api_base": "$url/vlmevalkit-several$end", "temperature": 0,
    $common},
  "sampled": {"class": "LMDeployAPI", "model": "qwenla", "api_base": "$url/vlmevalkit-several$end", "temperature": 0.7,
    "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.05, "seed": 7, "stream": true, $common},
  "gpt4v": {"class": "GPT4V", "model": "qwenla", "api_base": "$url/vlmevalkit-several$end", "temperature": 0,
    "img_detail": "high", "system_prompt": "You are a helpful assistant.", $common}},
 "data": {
  "POPE_local": {"class": "ImageYORNDataset", "dataset": "POPE_local"},
  "MMStar_local": {"class": "ImageMCQDataset", "dataset": "MMStar_local"},
  "MMMU_local": {"class": "MMMUDataset", "dataset": "MMMU_local"}}}
END
  kit_run vlmevalkit-several --config "$work/kit/config.json" --judge exact_matching
  # MathVision's scorer wants a judge: the same server.
  kit_run vlmevalkit-mathvision --model qwenla --base-url "$url/vlmevalkit-mathvision/v1" --key $key --max-tokens 128 \
    --data MathVision_local --data-config '{"MathVision_local": {"class": "MathVision", "dataset": "MathVision_local"}}' \
    --judge qwenla --judge-base-url "$url/vlmevalkit-judge/v1" --judge-key $key
}

data=("$work/data" "--size=$size")
[ -z "${MATHVISION:-}" ] || data+=("--mathvision=$MATHVISION")
"$python" "$here/data.py" "${data[@]}"
"$python" -m qwenla_jax serve "--port=$port" "--api-key=$key" --served-model-name qwenla --grace-period=0 \
  2> "$work/log/server.log" &
server=$!
"$python" "$here/record.py" "http://127.0.0.1:$port" "$work/requests" "--port=$((port + 1))" &
recorder=$!
trap 'kill $server $recorder; wait' EXIT
until curl --silent --fail "http://127.0.0.1:$port/health"; do
  kill -0 $server
  sleep 1
done
for harness in "$@"; do "$harness"; done
trap - EXIT
kill $server $recorder
wait || true
"$python" -u "$here/check.py" "$work"
