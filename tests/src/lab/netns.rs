//! Network namespaces without names: each lives as long as a descriptor of it, so a killed run leaves none behind.
//! Entered by `setns(CLONE_NEWNET)` alone: a copied mount namespace would pin the mounts of the tests.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context, Result, bail};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::system::{INSTALL, NoProgram};

/// A network namespace with `lo` up.
#[derive(Debug)]
pub struct NetNs {
    descriptor: File,
}

impl NetNs {
    /// A new one.
    pub fn new() -> Result<NetNs> {
        let make = || -> Result<NetNs> {
            // SAFETY: this thread was made for the call and shares no network state that anyone relies on.
            unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }
                .context("unshare(CLONE_NEWNET)")?;
            Ok(NetNs { descriptor: File::open("/proc/thread-self/ns/net")? })
        };
        let namespace = std::thread::scope(|scope| scope.spawn(make).join())
            .unwrap_or_else(|_| bail!("the thread that makes a namespace panicked"))?;
        namespace.ip("link set lo up")?;
        Ok(namespace)
    }

    /// The path by which another process (`ip link … netns PATH`) reaches it while we live.
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.descriptor.as_raw_fd())
    }

    /// The descriptor's number.
    pub fn descriptor(&self) -> &File {
        &self.descriptor
    }

    /// A command that will run inside.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let descriptor = self.descriptor.as_raw_fd();
        // SAFETY: setns is a single system call on a descriptor that is open in the child until exec.
        unsafe {
            command.pre_exec(move || {
                let result = libc::setns(descriptor, libc::CLONE_NEWNET);
                if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
            });
        }
        command
    }

    /// Runs a command inside and gives what it printed; fails with its error output.
    pub fn run(&self, words: &[&str]) -> Result<String> {
        let (program, arguments) = words.split_first().context("no program")?;
        let output = match self.command(program).args(arguments).output() {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(NoProgram((*program).to_owned(), INSTALL).into());
            }
            output => output.with_context(|| format!("{program} cannot be started"))?,
        };
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        bail!("{}: {}", words.join(" "), String::from_utf8_lossy(&output.stderr).trim())
    }

    /// `ip WORDS` inside.
    pub fn ip(&self, words: &str) -> Result<String> {
        let mut all = vec!["ip"];
        all.extend(words.split_whitespace());
        self.run(&all)
    }

    /// Runs `work` on a thread inside: its sockets belong to this namespace.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        std::thread::scope(|scope| {
            let inside = scope.spawn(|| {
                move_into_link_name_space(self.descriptor.as_fd(), Some(LinkNameSpaceType::Network))
                    .context("setns(CLONE_NEWNET)")?;
                work()
            });
            inside.join().unwrap_or_else(|_| bail!("the thread inside the namespace panicked"))
        })
    }

    /// A descriptor for a thread of the caller's own making.
    pub fn handle(&self) -> Result<NetNs> {
        Ok(NetNs { descriptor: self.descriptor.try_clone()? })
    }

    /// Moves the calling thread inside, for good.
    pub fn move_this_thread(&self) -> Result<()> {
        move_into_link_name_space(self.descriptor.as_fd(), Some(LinkNameSpaceType::Network))
            .context("setns(CLONE_NEWNET)")
    }

    /// A cable between an adapter of this name here and one there, with these addresses (`10.9.0.1/24`).
    pub fn cable(
        &self,
        name: &str,
        address: &str,
        other: &NetNs,
        other_name: &str,
        other_address: &str,
    ) -> Result<()> {
        self.ip(&format!("link add {name} type veth peer name {other_name} netns {}", other.path()))?;
        for (namespace, adapter, address) in [(self, name, address), (other, other_name, other_address)] {
            if !address.is_empty() {
                namespace.ip(&format!("address add {address} dev {adapter}"))?;
            }
            namespace.ip(&format!("link set {adapter} up"))?;
        }
        Ok(())
    }

    /// Pulls the cable at this adapter.
    pub fn cut(&self, adapter: &str) -> Result<()> {
        self.ip(&format!("link set {adapter} down")).map(drop)
    }

    /// Puts the cable back.
    pub fn restore(&self, adapter: &str) -> Result<()> {
        self.ip(&format!("link set {adapter} up")).map(drop)
    }

    /// Drops `percent` of the packets that come in at this adapter (100: one direction is dead), without a carrier
    /// change that anyone could see.
    pub fn drop_incoming(&self, adapter: &str, percent: u8) -> Result<()> {
        self.drop_rule(&format!("iifname \"{adapter}\" {}", drop_share(percent)))
    }

    /// Drops `percent` of the incoming TCP packets to or from this port.
    pub fn drop_port(&self, adapter: &str, port: u16, percent: u8) -> Result<()> {
        for side in ["dport", "sport"] {
            let rule =
                format!("iifname \"{adapter}\" tcp {side} {port} numgen random mod 100 < {percent} drop");
            self.drop_rule(&rule)?;
        }
        Ok(())
    }

    fn drop_rule(&self, rule: &str) -> Result<()> {
        self.nft("add table inet lab")?;
        self.nft("add chain inet lab in { type filter hook input priority 0 ; }")?;
        self.nft(&format!("add rule inet lab in {rule}"))
    }

    /// Sends what comes in for this TCP port to another one here: a relay can then stand in the wire.
    pub fn redirect(&self, adapter: &str, port: u16, to: u16) -> Result<()> {
        self.nft("add table inet lab")?;
        self.nft("add chain inet lab pre { type nat hook prerouting priority -100 ; }")?;
        self.nft(&format!("add rule inet lab pre iifname \"{adapter}\" tcp dport {port} redirect to :{to}"))
    }

    /// Takes every drop and redirect away.
    pub fn heal(&self) -> Result<()> {
        self.nft("add table inet lab")?;
        self.nft("delete table inet lab")
    }

    fn nft(&self, rule: &str) -> Result<()> {
        self.run(&["nft", rule]).map(drop)
    }
}

/// The end of a rule that drops so many of a hundred packets.
fn drop_share(percent: u8) -> String {
    if percent >= 100 { "drop".to_owned() } else { format!("numgen random mod 100 < {percent} drop") }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::time::Duration;

    use super::*;
    use crate::lab;

    fn pair() -> Option<(NetNs, NetNs)> {
        if let Some(why) = lab::unavailable() {
            println!("SKIPPED: {why}");
            return None;
        }
        let (a, b) = (NetNs::new().expect("a"), NetNs::new().expect("b"));
        a.cable("mir", "10.9.0.1/24", &b, "mir", "10.9.0.2/24").expect("a cable");
        Some((a, b))
    }

    fn reaches(a: &NetNs, b: &NetNs) -> bool {
        let listener = b.enter(|| Ok(TcpListener::bind("10.9.0.2:7700")?)).expect("an address of b");
        let address = listener.local_addr().expect("bound");
        let answer = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept()?;
            stream.write_all(b"x")
        });
        let reached = a
            .enter(|| {
                let mut stream = TcpStream::connect_timeout(&address, Duration::from_millis(300))?;
                let mut byte = [0];
                stream.set_read_timeout(Some(Duration::from_secs(5)))?;
                Ok(stream.read_exact(&mut byte)?)
            })
            .is_ok();
        if !reached {
            // Ends the thread that waits.
            b.enter(|| Ok(TcpStream::connect(address).map(drop)?)).expect("inside b it is reachable");
        }
        let _ = answer.join();
        reached
    }

    #[test]
    fn a_cable_carries_until_it_is_cut_and_again_after() {
        let Some((a, b)) = pair() else { return };
        assert!(reaches(&a, &b));
        a.cut("mir").expect("cut");
        assert!(!reaches(&a, &b));
        a.restore("mir").expect("restored");
        assert!(reaches(&a, &b));
    }

    #[test]
    fn one_direction_can_be_dropped_and_healed() {
        let Some((a, b)) = pair() else { return };
        b.drop_incoming("mir", 100).expect("a rule");
        assert!(!reaches(&a, &b));
        b.heal().expect("healed");
        assert!(reaches(&a, &b));
    }
}
