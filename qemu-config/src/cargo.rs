//! Programs of this workspace that the rig builds itself: those of the guest, and the rig's own
//! binary when the rig is used as a library.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail};

use crate::child;
use crate::paths::{self, Cache};
use crate::progress::Step;

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Programs for the guest, statically linked.
#[derive(Clone, Debug)]
pub struct GuestPrograms {
    /// Process 1.
    pub agent: PathBuf,
    /// The tour.
    pub tour: PathBuf,
}

/// Builds the guest's programs (cargo decides what is stale).
pub fn guest_programs(cache: &Cache) -> Result<GuestPrograms> {
    let folder = static_programs(cache, "extlb-guest", "guest's programs")?;
    Ok(GuestPrograms {
        agent: folder.join("extlb-agent"),
        tour: folder.join("extlb-tour"),
    })
}

/// Builds the program that times a way to the device; it runs in guests and on the machine.
pub fn bench_program(cache: &Cache) -> Result<PathBuf> {
    Ok(static_programs(cache, "extlb-bench", "benchmark")?.join("extlb-bench"))
}

/// Builds the programs of a package, statically linked; the folder that they are in.
fn static_programs(cache: &Cache, package: &str, what: &str) -> Result<PathBuf> {
    let target = paths::target(cache)?.join("guest");
    let mut command = cargo(&target);
    command.args(["--package", package, "--bins", "--target", TARGET]);
    command.env(
        "RUSTFLAGS",
        "-C target-feature=+crt-static -C strip=symbols",
    );
    build(cache, &mut command, what).with_context(|| {
        format!(
            "cannot build the {what} (needed are cargo, a C linker and the static C library; see \
             `extlb doctor`)"
        )
    })?;
    Ok(target.join(TARGET).join("release"))
}

/// Whether this program understands the rig's command line, whatever it is called.
static IS_RIG: AtomicBool = AtomicBool::new(false);

/// Called by the rig's command line: this program can be started as device server and as sandbox.
pub fn this_is_the_rig() {
    IS_RIG.store(true, Ordering::Relaxed);
}

/// The rig's own binary, which also is the device server and the sandbox: this program if it is the
/// rig, else it is built.
pub fn rig_binary(cache: &Cache) -> Result<PathBuf> {
    if IS_RIG.load(Ordering::Relaxed) {
        return std::env::current_exe().context("cannot tell which program this is");
    }
    let target = paths::target(cache)?.join("rig");
    build(
        cache,
        cargo(&target).args(["--package", "extlb", "--bin", "extlb"]),
        "rig",
    )?;
    Ok(target.join("release/extlb"))
}

/// `cargo build --release`, free of what an outer cargo has set for its own build.
fn cargo(target: &Path) -> Command {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(program);
    command
        .current_dir(paths::repo())
        .args(["build", "--release", "--color=never"]);
    command.arg("--target-dir").arg(target);
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(confuses_cargo) {
            command.env_remove(name);
        }
    }
    command
}

/// Whether a variable is an outer build's; where crates come from (home, registries, network) stays.
fn confuses_cargo(name: &str) -> bool {
    let kept = [
        "CARGO_HOME",
        "CARGO_REGISTR",
        "CARGO_HTTP",
        "CARGO_NET",
        "CARGO_SOURCE",
    ];
    let outer = name.starts_with("CARGO")
        || name.starts_with("RUSTC")
        || [
            "RUSTFLAGS",
            "RUSTDOCFLAGS",
            "LD_LIBRARY_PATH",
            "OUT_DIR",
            "TARGET",
            "HOST",
        ]
        .contains(&name);
    outer && !kept.iter().any(|kept| name.starts_with(kept))
}

fn build(cache: &Cache, command: &mut Command, what: &str) -> Result<()> {
    let name: String = what.split(|c: char| !c.is_ascii_alphanumeric()).collect();
    let log = cache.path(format!("log/cargo-{name}-{}.log", std::process::id()))?;
    let mut step = Step::begin(format!("building the {what}"));
    if let Err(error) = child::run(command, &log, &mut step, String::new) {
        bail!("{error:#}");
    }
    step.done();
    let _ = std::fs::remove_file(&log);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::confuses_cargo;

    #[test]
    fn an_outer_cargos_variables_go_and_the_way_to_crates_stays() {
        for name in [
            "CARGO_PKG_NAME",
            "CARGO_TARGET_DIR",
            "CARGO",
            "RUSTFLAGS",
            "RUSTC_WRAPPER",
        ] {
            assert!(confuses_cargo(name), "{name}");
        }
        for name in [
            "CARGO_HOME",
            "CARGO_HTTP_PROXY",
            "RUSTUP_HOME",
            "PATH",
            "HOME",
        ] {
            assert!(!confuses_cargo(name), "{name}");
        }
    }
}
