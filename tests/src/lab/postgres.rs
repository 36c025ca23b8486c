//! Debian's PostgreSQL on a server's mounted file system, as the user it wants, and pgbench as its client outside of
//! the server: what the client was told is committed is recorded outside of the volume.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;

use anyhow::{Context, Result, anyhow, bail, ensure};
use rustix::process::Signal;

use super::pair::LIMIT;
use super::{Server, filesystem, system, wait};

/// Who runs the database.
const USER: &str = "postgres";
/// Where Debian puts the programs of each version.
const VERSIONS: &str = "/usr/lib/postgresql";
/// pgbench's scale: 100,000 accounts each.
const SCALE: u32 = 2;
const CLIENTS: u64 = 4;
/// Transactions of one client in one run of pgbench.
const TRANSACTIONS: u64 = 200;

/// Small logs, so that a short run sees many checkpoints; everything that makes a commit durable is left as it is.
const SETTINGS: &[&str] = &[
    "listen_addresses=",
    "shared_buffers=16MB",
    "min_wal_size=16MB",
    "max_wal_size=32MB",
    "checkpoint_timeout=30s",
    "max_connections=20",
];

/// One transaction of pgbench, as its own built-in one, and a row that says whose and which it was.
fn script() -> String {
    format!(
        r"\set n :n + 1
\set aid random(1, 100000 * {SCALE})
\set bid random(1, 1 * {SCALE})
\set tid random(1, 10 * {SCALE})
\set delta random(-5000, 5000)
BEGIN;
UPDATE pgbench_accounts SET abalance = abalance + :delta WHERE aid = :aid;
SELECT abalance FROM pgbench_accounts WHERE aid = :aid;
UPDATE pgbench_tellers SET tbalance = tbalance + :delta WHERE tid = :tid;
UPDATE pgbench_branches SET bbalance = bbalance + :delta WHERE bid = :bid;
INSERT INTO pgbench_history (tid, bid, aid, delta, mtime) VALUES (:tid, :bid, :aid, :delta, CURRENT_TIMESTAMP);
INSERT INTO ledger (client, number) VALUES (:base + :client_id, :n);
END;
"
    )
}

/// A database: its data on a mounted file system, its socket and its log outside.
#[derive(Debug)]
pub struct Postgres {
    programs: PathBuf,
    data: PathBuf,
    outside: PathBuf,
    postmaster: Option<i32>,
}

impl Postgres {
    /// With its data below the mount point, and everything else in `outside`, which is made.
    pub fn new(point: &Path, outside: &Path) -> Result<Postgres> {
        let versions =
            std::fs::read_dir(VERSIONS).context("PostgreSQL is not installed (package postgresql)")?;
        let newest = versions
            .flatten()
            .filter_map(|entry| entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()))
            .filter(|version| Path::new(VERSIONS).join(format!("{version}/bin/postgres")).exists())
            .max();
        let version = newest.context("PostgreSQL has no server program (package postgresql)")?;
        std::fs::create_dir_all(outside)?;
        system::run(&["chown", USER, &outside.display().to_string()], LIMIT)?;
        std::fs::write(outside.join("script"), script())?;
        Ok(Postgres {
            programs: Path::new(VERSIONS).join(format!("{version}/bin")),
            data: point.join("pg"),
            outside: outside.to_owned(),
            postmaster: None,
        })
    }

    fn program(&self, name: &str) -> String {
        self.programs.join(name).display().to_string()
    }

    /// Words that run a program as the database's user.
    fn as_user(&self, name: &str) -> Vec<String> {
        let user = [format!("--reuid={USER}"), format!("--regid={USER}"), "--clear-groups".to_owned()];
        let mut words = vec!["setpriv".to_owned()];
        words.extend(user);
        words.push(self.program(name));
        words
    }

    /// A new database on the mounted file system of this server, started, with pgbench's tables.
    pub fn create(&mut self, server: &Server) -> Result<()> {
        let data = self.data.display().to_string();
        filesystem::on(server, &["install", "-d", "-m", "700", "-o", USER, "-g", USER, &data])?;
        let mut words = self.as_user("initdb");
        let options =
            ["-U", USER, "-A", "trust", "--no-locale", "-E", "UTF8", "-k", "--wal-segsize=4", "-D", &data];
        words.extend(options.map(str::to_owned));
        filesystem::on(server, &words.iter().map(String::as_str).collect::<Vec<_>>())?;
        self.start(server)?;
        let scale = SCALE.to_string();
        self.client("pgbench", &["-i", "-q", "-s", &scale, "postgres"])?;
        self.query("CREATE TABLE ledger (client int, number int, PRIMARY KEY (client, number))").map(drop)
    }

    /// The server's own log.
    pub fn log(&self) -> String {
        let bytes = std::fs::read(self.outside.join("log")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Starts it on this server and waits until it answers: a crash is recovered first.
    pub fn start(&mut self, server: &Server) -> Result<()> {
        for stale in [".s.PGSQL.5432", ".s.PGSQL.5432.lock"] {
            let _ = std::fs::remove_file(self.outside.join(stale));
        }
        let mut words = self.as_user("postgres");
        words.extend(["-D".to_owned(), self.data.display().to_string()]);
        words.extend(["-k".to_owned(), self.outside.display().to_string()]);
        words.extend(SETTINGS.iter().flat_map(|setting| ["-c".to_owned(), (*setting).to_owned()]));
        let log = self.outside.join("log");
        let pid = server.host()?.spawn(&words, &log, &log)?;
        self.postmaster = Some(pid);
        wait::until("PostgreSQL to answer", LIMIT, || {
            if let Some(ended) = server.host()?.ended(pid)? {
                bail!("PostgreSQL ended ({ended:?}): {}", self.log_tail());
            }
            Ok(self.query("SELECT 1").is_ok().then_some(()))
        })
        .with_context(|| self.log_tail())
    }

    fn log_tail(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(12)..].join("\n")
    }

    /// Stops it in order.
    pub fn stop(&mut self, server: &Server) -> Result<()> {
        let pid = self.postmaster.take().context("PostgreSQL does not run")?;
        server.host()?.signal(pid, Signal::INT)?;
        let ended = server.host()?.wait(pid, LIMIT).with_context(|| self.log_tail())?;
        ensure!(ended.code == Some(0), "PostgreSQL ended with {ended:?}: {}", self.log_tail());
        Ok(())
    }

    /// A client program outside of the server, on its socket.
    fn client(&self, name: &str, words: &[&str]) -> Result<String> {
        let (program, socket) = (self.program(name), self.outside.display().to_string());
        let all = [&[program.as_str(), "-h", &socket, "-U", USER], words].concat();
        system::run(&all, LIMIT)
    }

    /// One statement; gives its rows, columns parted by `|`.
    pub fn query(&self, statement: &str) -> Result<String> {
        self.client("psql", &["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-c", statement, "postgres"])
    }

    /// Every table and index is read by PostgreSQL's own checker, and the whole database is dumped.
    pub fn check_all(&self) -> Result<()> {
        self.client("pg_amcheck", &["--install-missing", "--heapallindexed", "postgres"])
            .context("pg_amcheck")?;
        let dump = self.outside.join("dump");
        self.client("pg_dump", &["-f", &dump.display().to_string(), "postgres"]).context("pg_dump")?;
        let text = std::fs::read_to_string(&dump)?;
        ensure!(text.contains("PostgreSQL database dump complete"), "the dump has no end");
        Ok(())
    }

    /// Every transaction that the client saw committed is there, whole and once; of each client at most one more,
    /// whose answer was lost. Gives how many are there.
    pub fn check_commits(&self, ledger: &Ledger) -> Result<u64> {
        let rows =
            self.query("SELECT client, count(*), min(number), max(number) FROM ledger GROUP BY client")?;
        let mut found = BTreeMap::new();
        for row in rows.lines() {
            let numbers: Vec<u64> = row.split('|').map(str::parse).collect::<Result<_, _>>()?;
            let [client, count, first, last] = numbers[..] else { bail!("a row {row:?}") };
            ensure!(
                first == 1 && count == last,
                "client {client}: {count} transactions, from {first} to {last}"
            );
            found.insert(client, last);
        }
        for (client, committed) in &ledger.committed {
            let there = found.get(client).copied().unwrap_or(0);
            ensure!(
                (*committed..=committed + 1).contains(&there),
                "client {client} saw {committed} transactions committed, {there} are there"
            );
        }
        if let Some(client) = found.keys().find(|client| !ledger.committed.contains_key(*client)) {
            bail!("transactions of client {client}, which there was never");
        }
        self.check_sums()?;
        Ok(found.values().sum())
    }

    /// No transaction is there by halves.
    fn check_sums(&self) -> Result<()> {
        let sums = self.query(
            "SELECT (SELECT sum(abalance) FROM pgbench_accounts), (SELECT sum(tbalance) FROM pgbench_tellers), \
             (SELECT sum(bbalance) FROM pgbench_branches), (SELECT coalesce(sum(delta), 0) FROM pgbench_history), \
             (SELECT count(*) FROM pgbench_history), (SELECT count(*) FROM ledger)",
        )?;
        let numbers: Vec<i64> = sums.trim().split('|').map(str::parse).collect::<Result<_, _>>()?;
        let [accounts, tellers, branches, history, rows, ledger] = numbers[..] else {
            bail!("sums {sums:?}")
        };
        ensure!(
            accounts == tellers && tellers == branches && branches == history && rows == ledger,
            "half a transaction: sums {sums}"
        );
        Ok(())
    }
}

/// What pgbench's clients were told is committed; it outlives every server.
#[derive(Debug, Default)]
pub struct Ledger {
    runs: u64,
    committed: BTreeMap<u64, u64>,
}

impl Ledger {
    /// All transactions.
    pub fn total(&self) -> u64 {
        self.committed.values().sum()
    }

    /// Takes pgbench's log of a run: a line for each committed transaction, client and number first.
    fn take(&mut self, base: u64, log: &str) -> Result<()> {
        for line in log.lines() {
            let mut words = line.split(' ').map(str::parse::<u64>);
            let (Some(Ok(client)), Some(Ok(number))) = (words.next(), words.next()) else {
                bail!("a line of pgbench's log: {line:?}")
            };
            let committed = self.committed.entry(base + client).or_default();
            ensure!(number == *committed + 1, "transaction {number} after {committed}: {line:?}");
            *committed = number;
        }
        Ok(())
    }
}

/// The ledger as threads share it.
pub type SharedLedger = Arc<Mutex<Ledger>>;

/// Locks the ledger.
pub fn lock(ledger: &SharedLedger) -> Result<MutexGuard<'_, Ledger>> {
    ledger.lock().map_err(|_| anyhow!("a thread died while it wrote the ledger"))
}

/// pgbench, one run after the other until told to stop or until it fails.
#[derive(Debug)]
pub struct Bench {
    stop: Arc<AtomicBool>,
    outside: PathBuf,
    ledger: SharedLedger,
    thread: JoinHandle<Result<()>>,
}

impl Bench {
    /// Starts it on this database.
    pub fn start(database: &Postgres, ledger: &SharedLedger) -> Bench {
        let stop = Arc::new(AtomicBool::new(false));
        let outside = database.outside.clone();
        let run = Runs {
            program: database.program("pgbench"),
            outside: outside.clone(),
            ledger: Arc::clone(ledger),
        };
        let until = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            while !until.load(Ordering::Relaxed) {
                run.one()?;
            }
            Ok(())
        });
        Bench { stop, outside, ledger: Arc::clone(ledger), thread }
    }

    /// Waits until so many more transactions are committed.
    pub fn wait_more(&self, more: u64) -> Result<()> {
        let seen = || -> Result<u64> {
            // The log of the run under way is counted in the ledger once that has ended.
            let ledger = lock(&self.ledger)?;
            let log = std::fs::read_to_string(log_of(&self.outside, ledger.runs)?).unwrap_or_default();
            let under_way =
                if ledger.committed.contains_key(&base_of(ledger.runs)) { 0 } else { log.lines().count() };
            Ok(ledger.total() + under_way as u64)
        };
        let goal = seen()? + more;
        wait::until(&format!("{more} more transactions"), LIMIT, || {
            ensure!(!self.thread.is_finished(), "pgbench ended");
            Ok((seen()? >= goal).then_some(()))
        })
    }

    fn join(self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow!("the thread that runs pgbench panicked"))?
    }

    /// Lets the run under way end; nothing may have failed.
    pub fn finish(self) -> Result<()> {
        self.join().context("pgbench noticed")
    }

    /// Its server is dead: it must have noticed.
    pub fn broken(self) -> Result<()> {
        match self.join() {
            Ok(()) => bail!("pgbench did not notice that its server died"),
            Err(error) if format!("{error:#}").contains("pgbench's log") => Err(error),
            Err(_) => Ok(()),
        }
    }
}

/// What the thread of a [`Bench`] needs.
struct Runs {
    program: String,
    outside: PathBuf,
    ledger: SharedLedger,
}

fn base_of(run: u64) -> u64 {
    run * CLIENTS
}

fn prefix_of(outside: &Path, run: u64) -> PathBuf {
    outside.join(format!("run{run}"))
}

/// pgbench appends its process id to the log's name.
fn log_of(outside: &Path, run: u64) -> Result<PathBuf> {
    let begin = format!("run{run}.");
    let named = |entry: &std::fs::DirEntry| entry.file_name().to_string_lossy().starts_with(&begin);
    let found = std::fs::read_dir(outside)?.flatten().find(named);
    Ok(found.map_or_else(|| outside.join("no-log"), |entry| entry.path()))
}

impl Runs {
    fn one(&self) -> Result<()> {
        let run = {
            let mut ledger = lock(&self.ledger)?;
            ledger.runs += 1;
            ledger.runs
        };
        let text = |path: PathBuf| path.display().to_string();
        let base = format!("base={}", base_of(run));
        let (script, prefix) = (text(self.outside.join("script")), text(prefix_of(&self.outside, run)));
        let (socket, clients, transactions) =
            (text(self.outside.clone()), CLIENTS.to_string(), TRANSACTIONS.to_string());
        let mut words =
            vec![self.program.as_str(), "-h", &socket, "-U", USER, "-n", "-l", "--log-prefix", &prefix];
        words.extend([
            "-c",
            &clients,
            "-j",
            "1",
            "-t",
            &transactions,
            "-f",
            &script,
            "-D",
            "n=0",
            "-D",
            &base,
        ]);
        words.push("postgres");
        let said = system::try_run(&words, LIMIT)?;
        let log = log_of(&self.outside, run)?;
        let told = std::fs::read_to_string(&log).unwrap_or_default();
        let mut ledger = lock(&self.ledger)?;
        for client in 0..CLIENTS {
            ledger.committed.entry(base_of(run) + client).or_default();
        }
        ledger.take(base_of(run), &told)?;
        ensure!(said.success, "pgbench failed: {}", said.text());
        let whole = CLIENTS * TRANSACTIONS;
        ensure!(
            told.lines().count() as u64 == whole,
            "a run without an error committed {} of {whole}",
            told.lines().count()
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ledger_counts_each_client_and_refuses_gaps() {
        let mut ledger = Ledger::default();
        ledger.take(8, "0 1 1673 0 1795271569 433770\n1 1 9 0 1 2\n0 2 5 0 1 2\n").expect("a log");
        assert_eq!(ledger.total(), 3);
        assert_eq!(ledger.committed, BTreeMap::from([(8, 2), (9, 1)]));
        assert!(ledger.take(8, "0 4 1 0 1 2\n").is_err());
        assert!(ledger.take(8, "0 failed 1 0 1 2\n").is_err());
    }
}
