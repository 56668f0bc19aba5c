# Runs all of the kernel's semantic patches in report mode over the files given, in the kernel's
# tree. Prints what they find, and at last how many they were. Like scripts/coccicheck, which takes
# one file or a whole folder.
version=$(spatch --version | sed -n '1s/[^0-9]*\([0-9.]*[0-9]\).*/\1/p')
count=0
failed=0

# Whether the version $1 is not newer than $2.
reaches() {
	[ "$(printf '%s\n' "$1" "$2" | sort -V | head -n 1)" = "$1" ]
}

one() {
	output=$(spatch -D report --no-show-diff --very-quiet --cocci-file "$@" 2>&1) ||
		echo "$1:1: error: spatch failed: $(printf '%s' "$output" | tr '\n' ' ')"
	printf '%s\n' "$output" | sed 's/^[[:space:]]*//' | grep -E '^[^ :]+:[0-9]'
	return 0
}

jobs=$(nproc)
for cocci in $(find scripts/coccinelle -name '*.cocci' | sort); do
	requires=$(sed -n 's/.*Requires: *//p' "$cocci")
	grep -q 'virtual report' "$cocci" || continue
	# Two have parts in OCaml, for which there is no compiler here.
	! grep -q ':ocaml' "$cocci" || continue
	[ -z "$requires" ] || reaches "$requires" "$version" || continue
	options=$(sed -n 's/.*Options: *//p' "$cocci")
	count=$((count + 1))
	while [ "$(jobs -rp | wc -l)" -ge "$jobs" ]; do
		wait -n
	done
	one "$cocci" $options -I include "$@" &
done
wait
echo "$count"
