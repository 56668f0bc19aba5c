//! Who runs `make`: the toolbox inside a sandbox, or the machine's own tools where there is none.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Result, bail};

use crate::sandbox::{self, Bind};
use crate::toolbox::Toolbox;

/// Where the kernel's tree is seen in the sandbox; the same for all builds, so that paths which a
/// build has written down stay true.
const TREE: &str = "/kernel";
/// Further folders are seen as `/with0`, `/with1` …
const WITH: &str = "/with";

/// What the machine must have for a build without sandbox.
const TOOLS: [&str; 5] = ["gcc", "make", "flex", "bison", "bc"];

/// A way to run `make`.
pub enum Maker {
    /// The toolbox as root.
    Sandbox {
        /// The rig's binary.
        rig: PathBuf,
        /// The toolbox's folder.
        root: PathBuf,
    },
    /// The machine's compiler and tools.
    Machine,
}

impl Maker {
    /// Chooses: the sandbox if it works here.
    ///
    /// # Errors
    /// When it does not and the machine lacks a tool.
    pub fn find(rig: &Path, toolbox: &Toolbox) -> Result<Self> {
        let problem = match sandbox::check(rig, &toolbox.root) {
            Ok(()) => {
                return Ok(Self::Sandbox {
                    rig: rig.to_path_buf(),
                    root: toolbox.root.clone(),
                });
            }
            Err(problem) => problem,
        };
        let missing = missing_tools();
        if missing.is_empty() {
            return Ok(Self::Machine);
        }
        bail!(
            "{problem:#}\nA kernel is then built with the machine's own tools, of which these are \
             missing: {}. Install them, or allow user namespaces (sysctl \
             kernel.unprivileged_userns_clone=1 on some systems), or give a kernel with --kernel",
            missing.join(", ")
        );
    }

    /// `make` in `tree`, with further folders at hand.
    pub fn make(&self, tree: &Path, with: &[&Path]) -> Command {
        let mut command = self.command("make", tree, with);
        // The same sources give the same kernel.
        command.args(["KBUILD_BUILD_USER=extlb", "KBUILD_BUILD_HOST=extlb"]);
        command.args(["KBUILD_BUILD_VERSION=1", "KBUILD_BUILD_TIMESTAMP=@0"]);
        command
    }

    /// A program of those that build, in `tree`, with further folders at hand.
    pub fn command(&self, program: &str, tree: &Path, with: &[&Path]) -> Command {
        match self {
            Self::Sandbox { rig, root } => {
                let mut binds = vec![Bind {
                    from: tree.to_path_buf(),
                    to: TREE.into(),
                }];
                for (index, from) in with.iter().enumerate() {
                    binds.push(Bind {
                        from: from.to_path_buf(),
                        to: self.path_of(from, index).into(),
                    });
                }
                sandbox::command(rig, root, &binds, TREE, program)
            }
            Self::Machine => {
                let mut command = Command::new(program);
                command.current_dir(tree).env("LC_ALL", "C");
                command
            }
        }
    }

    /// Where such a program sees the further folder number `index`.
    pub fn path_of(&self, outside: &Path, index: usize) -> String {
        match self {
            Self::Sandbox { .. } => format!("{WITH}{index}"),
            Self::Machine => outside.display().to_string(),
        }
    }
}

/// What the machine lacks for building a kernel itself.
pub fn missing_tools() -> Vec<String> {
    let runs = |command: &mut Command| {
        let silent = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        silent.status().is_ok_and(|status| status.success())
    };
    let mut missing: Vec<String> = TOOLS
        .iter()
        .filter(|tool| !runs(Command::new(tool).arg("--version")))
        .map(ToString::to_string)
        .collect();
    let headers = [
        "-E",
        "-include",
        "gelf.h",
        "-x",
        "c",
        "/dev/null",
        "-o",
        "/dev/null",
    ];
    if !runs(Command::new("gcc").args(headers)) {
        missing.push("libelf's headers (package libelf-dev)".to_owned());
    }
    missing
}
