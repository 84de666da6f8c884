#!/usr/bin/env bash
# FlashAttention 4 for a machine without a network, in two parts, for what is carried there is limited; its kernels for Hopper are
# compiled here, so that no GPU waits for them (benchmarks/flash_compile.py).
#
#   benchmarks/flash_attention_4.sh pack FOLDER MIB        where pip has a network: FOLDER/first, of so many MiB, and FOLDER/second
#   benchmarks/flash_attention_4.sh unpack PART PART TO    there: puts it in TO, tries the import, and prints what is to be exported
# PYTHON names the Python of that machine's version, which has torch and cuda-bindings (default: python3).
set -euo pipefail
python=${PYTHON:-python3}
# with what they need, but for what comes with torch
packages=(
	flash-attn-4==4.0.0b36 quack-kernels==0.6.5 einops==0.8.2 torch-c-dlpack-ext==0.1.5 apache-tvm-ffi==0.1.15.post2
	nvidia-cutlass-dsl==4.8.1 nvidia-cutlass-dsl-libs-{base,core,cu13}"==4.8.1"
)
root=$(realpath "$(dirname "${BASH_SOURCE[0]}")/..")
of() { echo "$1:$1/nvidia_cutlass_dsl/dsl_packages"; }

case ${1:-}-$# in
pack-3)
	site=$(mktemp -d)
	trap 'rm -rf "$site" "$site.tar.xz"' EXIT
	"$python" -m pip install -q --no-deps --no-compile --target "$site" "${packages[@]}"
	mkdir -p "$2/first" "$2/second"
	PYTHONPATH=$root:$(of "$site") "$python" "$root/benchmarks/flash_compile.py" --to "$site/cache" >"$2/compiled.txt" 2>&1 ||
		echo "some do not compile: see $2/compiled.txt" >&2
	rm -rf "$site/nvidia_cutlass_dsl/dsl_packages/iket" # a profiler
	find "$site" -name __pycache__ -prune -exec rm -rf {} +
	tar -cJf "$site.tar.xz" -C "$site" .
	head -c "$(($3 << 20))" "$site.tar.xz" >"$2/first/flash"
	tail -c "+$((($3 << 20) + 1))" "$site.tar.xz" >"$2/second/flash"
	ls -l "$2/first/flash" "$2/second/flash"
	;;
unpack-4)
	rm -rf "$4" "$4.part"
	mkdir -p "$4.part"
	cat "$2" "$3" | tar -xJ -C "$4.part"
	mv "$4.part" "$4" # whole, for a session may be waiting for it
	PYTHONPATH=$(of "$4") "$python" -c 'import flash_attn.cute.interface as found; found.flash_attn_func, found._flash_attn_bwd' >&2
	echo "FLASH_ATTENTION_4=$(of "$4") FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED=1 FLASH_ATTENTION_CUTE_DSL_CACHE_DIR=$4/cache"
	;;
*)
	sed -n '2,7s/^# \?//p' "${BASH_SOURCE[0]}" >&2
	exit 2
	;;
esac
