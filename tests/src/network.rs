//! A network of our own in which links can be cut: one network namespace per node, joined by a bridge, inside a
//! namespace that belongs to this process. Nothing outside sees it, and it vanishes with the process.
//!
//! ```text
//!   clients and nemesis  10.77.0.254 ── bridge ─┬─ n1 10.77.0.1
//!                                               ├─ n2 10.77.0.2
//!                                               └─ n3 10.77.0.3
//! ```
//!
//! A link is cut in one direction by giving its end a wrong hardware address, so that packets leave and reach
//! nobody: no refusal tells either side, as with a pulled cable.

use std::io::Write;
use std::net::Ipv4Addr;
use std::os::unix::process::CommandExt;
use std::process::Command;

const ENTERED: &str = "D_ENGINE_TEST_NETWORK";
const WRONG_HARDWARE: &str = "02:de:ad:00:00:00";

/// An end of a link: a node, or the side of the clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The node of this id.
    Node(u32),
    /// This process.
    Clients,
}

impl End {
    fn host(self) -> u8 {
        match self {
            Self::Node(id) => u8::try_from(id).ok().filter(|id| *id < 254).expect("a test cluster is small"),
            Self::Clients => 254,
        }
    }

    /// Its address in the private network.
    #[must_use]
    pub fn address(self) -> Ipv4Addr {
        Ipv4Addr::new(10, 77, 0, self.host())
    }

    fn hardware(self) -> String {
        format!("02:77:00:00:00:{:02x}", self.host())
    }

    fn device(self) -> &'static str {
        if self == Self::Clients { "bridge" } else { "eth0" }
    }
}

/// Runs this program again in namespaces of its own, unless it already does. Call it first thing in `main`; it
/// returns once inside, or with the reason why that is impossible here.
///
/// # Errors
/// When the system grants no namespaces.
pub fn enter() -> Result<(), String> {
    if entered() {
        return Ok(());
    }
    let error = again()?.args(std::env::args_os().skip(1)).exec();
    Err(format!("unshare: {error}"))
}

/// Runs the body of the test named `test` in namespaces of its own: the test program starts itself again for this one
/// test. Where the system grants no namespaces, says so, visibly for whoever reads the output.
///
/// # Panics
/// When the test fails.
pub fn inside<F: Future<Output = ()>>(test: &str, body: impl FnOnce() -> F) {
    if entered() {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
        return runtime.expect("a runtime").block_on(body());
    }
    match again() {
        Ok(mut command) => {
            let status = command.args(["--exact", test, "--nocapture"]).status().expect("unshare runs");
            assert!(status.success(), "{test} failed in its own network, see above");
        }
        // Past the capture of the test runner: a test that was not run must be seen.
        Err(reason) => drop(writeln!(std::io::stderr(), "{test}: not run: no network namespaces here ({reason})")),
    }
}

fn entered() -> bool {
    std::env::var_os(ENTERED).is_some()
}

/// The flags of `unshare` that give a program a network and mounts of its own.
///
/// # Errors
/// When the system grants none; the reason.
pub fn namespaces() -> Result<Vec<&'static str>, String> {
    let mut flags = vec!["--net", "--mount"];
    if !rustix::process::geteuid().is_root() {
        flags.extend(["--user", "--map-root-user"]);
    }
    match Command::new("unshare").args(&flags).args(["--", "ip", "link"]).output() {
        Ok(output) if output.status.success() => Ok(flags),
        Ok(output) => Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
        Err(error) => Err(format!("unshare: {error}")),
    }
}

/// A command that runs this program, without arguments, in namespaces of its own.
fn again() -> Result<Command, String> {
    let exe = std::env::current_exe().map_err(|error| error.to_string())?;
    let mut command = Command::new("unshare");
    command.args(namespaces()?).arg("--").arg(exe).env(ENTERED, "1");
    Ok(command)
}

/// The private network of this process.
#[derive(Debug)]
pub struct PrivateNetwork {
    ends: Vec<End>,
}

impl PrivateNetwork {
    /// Lays the network for nodes 1 to `nodes`. Needs [`enter`] first.
    ///
    /// # Panics
    /// When a step fails.
    #[must_use]
    pub fn lay(nodes: u32) -> Self {
        assert!(entered(), "a private network needs namespaces of its own");
        run("mount", "-t tmpfs tmpfs /run");
        run("ip", "link set lo up");
        run("ip", "link add bridge type bridge");
        run("ip", &format!("link set bridge address {} up", End::Clients.hardware()));
        run("ip", &format!("addr add {}/24 dev bridge", End::Clients.address()));
        let mut ends = vec![End::Clients];
        for id in 1..=nodes {
            let node = End::Node(id);
            run("ip", &format!("netns add n{id}"));
            run("ip", &format!("link add n{id} type veth peer name eth0 netns n{id}"));
            run("ip", &format!("link set n{id} master bridge up"));
            run("ip", &format!("-n n{id} link set lo up"));
            run("ip", &format!("-n n{id} link set eth0 address {} up", node.hardware()));
            run("ip", &format!("-n n{id} addr add {}/24 dev eth0", node.address()));
            ends.push(node);
        }
        let network = Self { ends };
        network.heal();
        network
    }

    /// A command that runs `program` in the namespace of node `id`.
    #[must_use]
    pub fn command(id: u32) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/n{id}")).arg("--");
        command
    }

    /// Loses what `from` sends to `to`; the other direction stays.
    pub fn cut(&self, from: End, to: End) {
        point(from, to, WRONG_HARDWARE);
    }

    /// Cuts both directions.
    pub fn sever(&self, one: End, other: End) {
        self.cut(one, other);
        self.cut(other, one);
    }

    /// Severs `end` from every other, clients included if `with_clients`.
    pub fn isolate(&self, end: End, with_clients: bool) {
        for other in self.ends.iter().filter(|other| **other != end) {
            if with_clients || *other != End::Clients {
                self.sever(end, *other);
            }
        }
    }

    /// Mends every link.
    pub fn heal(&self) {
        for from in &self.ends {
            for to in self.ends.iter().filter(|to| *to != from) {
                point(*from, *to, &to.hardware());
            }
        }
    }
}

fn point(from: End, to: End, hardware: &str) {
    let place = match from {
        End::Node(id) => format!("-n n{id} "),
        End::Clients => String::new(),
    };
    let (address, device) = (to.address(), from.device());
    run("ip", &format!("{place}neigh replace {address} lladdr {hardware} dev {device} nud permanent"));
}

fn run(program: &str, arguments: &str) {
    let output = Command::new(program)
        .args(arguments.split(' '))
        .output()
        .unwrap_or_else(|error| panic!("{program} {arguments}: {error}"));
    assert!(output.status.success(), "{program} {arguments}: {}", String::from_utf8_lossy(&output.stderr).trim());
}
