//! Other people's tools and programs work on the device, on a kernel that is not ours: pciutils,
//! sysfs, and a VFIO user that knows nothing of it.

use extlb_tests::{output, sections, transcript};

const RIG: &str = env!("CARGO_BIN_EXE_extlb-under-test");
const WORKER: &str = env!("CARGO_BIN_EXE_extlb-vfio-worker");
const STRANGER: &str = env!("CARGO_BIN_EXE_extlb-generic-vfio");

/// What every script below begins with.
const PRELUDE: &str = r#"
set -eu
device=/sys/bus/pci/devices/$EXTLB_BDF
section() { echo "== $1"; }
# Waits for a condition that must come true, 20 s at most.
eventually() {
    end=$(($(cut -d. -f1 /proc/uptime) + 20))
    until "$@"; do
        [ "$(cut -d. -f1 /proc/uptime)" -lt $end ] || { echo "not within 20 s: $*" >&2; exit 1; }
        sleep 0.01
    done
}
driver() { basename "$(readlink $device/driver || echo none)"; }
gone() { ! [ -e "$1" ]; }
"#;

/// The registers are those of the scratch-like sort: written, read back, and cleared by a reset.
const SCRIPT: &str = r#"
section lspci
lspci -vvv -s $EXTLB_BDF
section setpci
# An idle device of vfio-pci sleeps, and would wake up with its registers reset.
echo on > $device/power/control
eventually grep -q D0 $device/power_state
setpci -s $EXTLB_BDF COMMAND
setpci -s $EXTLB_BDF COMMAND=0006
setpci -s $EXTLB_BDF COMMAND
setpci -s $EXTLB_BDF VENDOR_ID=ffff DEVICE_ID=ffff REVISION=ff
setpci -s $EXTLB_BDF VENDOR_ID DEVICE_ID REVISION
setpci -s $EXTLB_BDF CAP_MSIX+2.w=7fff
setpci -s $EXTLB_BDF CAP_MSIX+2.w
setpci -s $EXTLB_BDF CAP_MSIX+2.w=0000
section flr
bar0=$(head -n 1 $device/resource | cut -d' ' -f1)
register=$(printf '0x%x' $((bar0 + REGISTER)))
grep -o flr $device/reset_method
devmem $register 32 5
devmem $register 32
echo 1 > $device/reset
devmem $register 32
setpci -s $EXTLB_BDF COMMAND
section bind
driver
echo $EXTLB_BDF > $device/driver/unbind
driver
echo $EXTLB_BDF > /sys/bus/pci/drivers/vfio-pci/bind
driver
echo > $device/driver_override
echo $EXTLB_BDF > $device/driver/unbind
echo $EXTLB_BDF > /sys/bus/pci/drivers_probe
driver
! echo $EXTLB_BDF > /sys/bus/pci/drivers/vfio-pci/bind 2> /dev/null || exit 1
echo vfio-pci > $device/driver_override
echo $EXTLB_BDF > /sys/bus/pci/drivers_probe
driver
section rescan
echo 1 > $device/remove
eventually gone $device
lspci -s $EXTLB_BDF
echo 1 > /sys/bus/pci/rescan
eventually test -e $device
lspci -n -s $EXTLB_BDF
echo vfio-pci > $device/driver_override
echo $EXTLB_BDF > /sys/bus/pci/drivers_probe
driver
section group
eventually test -e /dev/vfio/$(basename $(readlink $device/iommu_group))
STRANGER $EXTLB_BDF --poke POKE
section cdev
if [ -e /dev/iommu ]; then
    STRANGER $EXTLB_BDF --poke POKE --cdev
else
    echo no iommufd
fi
section silent
WORKER --device $EXTLB_BDF work --doomed > /tmp/said &
worker=$!
working() { kill -0 $worker && grep -q working /tmp/said; }
eventually working
# Its registers read as all ones from here on, and it reaches no memory: as if it were pulled out.
setpci -s $EXTLB_BDF COMMAND=0000
wait $worker || exit 1
grep -v working /tmp/said
section remove
WORKER --device $EXTLB_BDF work > /tmp/said &
worker=$!
eventually working
echo 1 > $device/remove &
remover=$!
asked() { dmesg | grep -q "$EXTLB_BDF.*device request"; }
eventually asked
# The kernel waits for who has the device, even if that is killed in the midst of work.
test -e $device && kill -0 $worker && kill -9 $worker
wait $remover
gone $device && echo removed
echo 1 > /sys/bus/pci/rescan
eventually test -e $device
echo vfio-pci > $device/driver_override
echo $EXTLB_BDF > /sys/bus/pci/drivers_probe
eventually test -e /dev/vfio/$(basename $(readlink $device/iommu_group))
WORKER --device $EXTLB_BDF work --rounds 5
section end
lspci -vvv -s $EXTLB_BDF
"#;

#[test]
fn other_peoples_tools_and_programs_work_on_it() {
    use extlb_driver::spec::{BAR_REGS, regs};
    // Running with no configuration is an error, for which the device raises its vector 0.
    let poke = format!("{BAR_REGS}:{}={}:0", regs::CTRL.offset, regs::ctrl::ENABLE);
    let script = format!("{PRELUDE}{SCRIPT}")
        .replace("REGISTER", &regs::IQ_LOG2.offset.to_string())
        .replace("STRANGER", STRANGER)
        .replace("WORKER", WORKER)
        .replace("POKE", &poke);
    let add = ["--package", "pciutils", "--add", STRANGER, "--add", WORKER];
    let run = ["run", "--kernel", "stock"];
    let command = ["--", "sh", "-c", &script];
    let got = output(RIG, &[&run[..], &add, &command].concat()).unwrap();
    assert_eq!(got.status.code(), Some(0), "{}", transcript(&got));
    let stdout = String::from_utf8_lossy(&got.stdout);
    let sections = sections(&stdout);

    look_at_lspci(sections["lspci"]);
    // Memory space is on since the bus was set up, bus mastering was not.
    assert_eq!(
        sections["setpci"], "0002\n0006\n1234\ne71b\n01\n4003\n",
        "identity and table size cannot be written, mask-all and command can"
    );
    assert_eq!(
        sections["flr"], "flr\n0x00000005\n0x00000000\n0006\n",
        "a reset clears registers; the kernel restores the command register"
    );
    assert_eq!(
        sections["bind"],
        "vfio-pci\nnone\nvfio-pci\nnone\nvfio-pci\n"
    );
    assert_eq!(
        sections["rescan"],
        "01:00.0 1200: 1234:e71b (rev 01)\nvfio-pci\n"
    );
    for way in ["group", "cdev"] {
        let said = sections[way];
        if way == "cdev" && said == "no iommufd\n" {
            // Debian's kernel for virtual machines is without.
            continue;
        }
        for line in [
            "1234:e71b, class 120000, capabilities [1, 10, 11]\n",
            "BAR 0: 4096 bytes, first word 0x424c5845\n",
            "BAR 2: 1048576 bytes, first word 0x00000000\n",
            "BAR 4: 8192 bytes, ",
            "MSI-X: 4 vectors\n",
            "the device raised vector 0\n",
            "round 2: all is as it should be\n",
        ] {
            assert!(said.contains(line), "no {line:?} in {said}");
        }
    }
    let silent = sections["silent"];
    assert!(silent.starts_with("failed as it should: "), "{silent}");
    assert_eq!(silent.matches("\nthen: ").count(), 3, "{silent}");
    assert_eq!(sections["remove"], "removed\nworked\n");
    look_at_lspci(sections["end"]);
}

/// What lspci must and must not say of the device.
fn look_at_lspci(said: &str) {
    let first = said.lines().next().unwrap_or_default();
    let (_, what) = first.split_once(' ').expect("an address and a class");
    assert_eq!(what, "Processing accelerators: Device 1234:e71b (rev 01)");
    for text in [
        "Subsystem: Device 1234:e71b",
        "Status: Cap+ 66MHz- UDF- FastB2B- ParErr- DEVSEL=fast >TAbort- <TAbort- <MAbort- >SERR- <PERR- INTx-",
        "Capabilities: [40] Power Management version 3",
        "PMEClk- DSI- D1- D2- AuxCurrent=0mA PME(D0-,D1-,D2-,D3hot-,D3cold-)",
        "NoSoftRst+ PME-Enable-",
        "Capabilities: [50] Express (v2) Endpoint",
        "MaxPayload 128 bytes, PhantFunc 0",
        "RBE+ FLReset+",
        "MaxPayload 128 bytes, MaxReadReq 512 bytes",
        "CorrErr- NonFatalErr- FatalErr- UnsupReq- AuxPwr- TransPend-",
        "Speed 2.5GT/s, Width x1, ASPM not supported",
        "Target Link Speed: 2.5GT/s",
        "Capabilities: [90] MSI-X: Enable- Count=4 Masked-",
        "Vector table: BAR=4 offset=00000000",
        "PBA: BAR=4 offset=00001000",
        "Kernel driver in use: vfio-pci",
    ] {
        assert!(said.contains(text), "lspci does not say {text:?}: {said}");
    }
    // The BARs, each with its size and kind, at an address of its own, and no other.
    let regions = said
        .lines()
        .filter_map(|l| l.trim().strip_prefix("Region "));
    let regions: Vec<_> = regions
        .map(|l| l.split_once(": Memory at ").expect("memory"))
        .collect();
    let kinds = regions
        .iter()
        .map(|(n, l)| (*n, l.split_once(' ').map_or("", |l| l.1)));
    let kinds: Vec<_> = kinds.collect();
    let kind = |size: &str| format!("(64-bit, non-prefetchable) [size={size}]");
    let (k4, m1, k8) = (kind("4K"), kind("1M"), kind("8K"));
    assert_eq!(kinds, [("0", &k4[..]), ("2", &m1[..]), ("4", &k8[..])]);
    let lower = said.to_lowercase();
    for text in [
        "access denied",
        "unknown",
        "virtual",
        "!!!",
        "?",
        "chain broken",
        "looped",
        "unassigned",
        "ignored",
        "disabled]",
        "rev ff",
        "expansion rom",
        "i/o ports",
        "interrupt: pin",
        "extended capabilities",
        "bist",
    ] {
        assert!(!lower.contains(text), "lspci says {text:?}: {said}");
    }
    assert_eq!(said.matches("Capabilities: [").count(), 3, "{said}");
}
