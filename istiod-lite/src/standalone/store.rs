//! Where objects live: a durable table on disk (redb) and its image in memory, with the recent past kept for watchers.
//!
//! One writer at a time; a write is on disk before anyone sees it or is told of it, so `kill -9` loses nothing that was
//! answered. Readers never touch the disk. The store knows keys, resource versions and JSON, not kinds.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use serde_json::Value;
use tokio::sync::watch;

use super::error::{ApiError, ApiResult};

const OBJECTS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("objects");
/// Resource to the version of its last change, deletions included: after a restart a watcher that had seen that much
/// resumes without listing again.
const CHANGES: TableDefinition<'_, &str, u64> = TableDefinition::new("changes");

/// Events kept per resource for watchers that come back; older ones are answered 410 Gone.
const HISTORY: usize = 4096;

/// Identity of a stored object. `resource` is `<group>/<plural>`, the group empty for core.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    pub resource: Arc<str>,
    /// Empty for cluster-scoped objects.
    pub namespace: Arc<str>,
    pub name: Arc<str>,
}

impl Key {
    pub fn new(resource: &str, namespace: &str, name: &str) -> Self {
        Self { resource: resource.into(), namespace: namespace.into(), name: name.into() }
    }

    fn encode(&self) -> String {
        // No part can contain '|': DNS names, and path segments without '/' or '%'.
        format!("{}|{}|{}", self.resource, self.namespace, self.name)
    }

    fn decode(text: &str) -> Option<Self> {
        let mut parts = text.split('|');
        let key = Self::new(parts.next()?, parts.next()?, parts.next()?);
        parts.next().is_none().then_some(key)
    }
}

/// One version of an object; never changes.
#[derive(Debug)]
pub struct Object {
    pub version: u64,
    pub value: Value,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EventKind {
    Added,
    Modified,
    Deleted,
}

#[derive(Debug, Clone)]
pub struct Event {
    pub version: u64,
    pub kind: EventKind,
    /// The new state; for `Deleted` the last one, carrying the version of the deletion.
    pub object: Arc<Object>,
    pub previous: Option<Arc<Object>>,
}

type Names = BTreeMap<(Arc<str>, Arc<str>), Arc<Object>>;

#[derive(Debug)]
struct Resource {
    objects: Names,
    history: VecDeque<Event>,
    /// Every event after this version is in `history`.
    complete_since: u64,
    changed: watch::Sender<u64>,
}

impl Resource {
    fn new(complete_since: u64) -> Self {
        Self {
            objects: BTreeMap::new(),
            history: VecDeque::new(),
            complete_since,
            changed: watch::Sender::new(complete_since),
        }
    }
}

#[derive(Debug, Default)]
struct State {
    version: u64,
    resources: HashMap<Arc<str>, Resource>,
}

#[derive(Debug)]
pub struct Store {
    path: PathBuf,
    state: RwLock<State>,
    /// Held by the one writer.
    writing: Mutex<Disk>,
    /// Version of the last commit, for those who follow everything (the controllers).
    committed: watch::Sender<u64>,
}

/// The file, as the last write left it.
#[derive(Debug)]
struct Disk {
    /// `None` after a failed write: it is opened anew for the next one, because redb takes no more writes on a database
    /// that met an I/O error (a full disk, most likely).
    database: Option<Database>,
    /// What failed writes touched: nobody knows whether the disk has it, so the next write restores what is visible.
    doubtful: BTreeSet<Key>,
}

/// What a write did, for callers that follow up on it.
pub struct Committed<T> {
    pub result: T,
    pub touched: Vec<Key>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    Commit,
    /// Everything is computed and checked, nothing is kept.
    DryRun,
}

impl Store {
    /// Opens or creates the database file.
    ///
    /// # Errors
    /// When another process holds it, or it cannot be read.
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        use anyhow::Context as _;
        // Secrets are among the objects, and the directory may be somebody else's.
        super::files::make_private(path).with_context(|| format!("opening {}", path.display()))?;
        let database = Database::create(path)
            .with_context(|| format!("opening {} (is another server using this data directory?)", path.display()))?;
        let mut state = State::default();
        {
            let write = database.begin_write()?;
            write.open_table(OBJECTS)?;
            write.open_table(CHANGES)?;
            write.commit()?;
        }
        let read = database.begin_read()?;
        for entry in read.open_table(CHANGES)?.iter()? {
            let (resource, version) = entry?;
            state.version = state.version.max(version.value());
            state.resources.insert(resource.value().into(), Resource::new(version.value()));
        }
        for entry in read.open_table(OBJECTS)?.iter()? {
            let (key, bytes) = entry?;
            let key = Key::decode(key.value()).context("a malformed key in the database")?;
            let value: Value = serde_json::from_slice(bytes.value()).context("a malformed object in the database")?;
            let version = version_of(&value).context("a stored object without resourceVersion")?;
            state.version = state.version.max(version);
            let resource = state.resources.entry(key.resource).or_insert_with(|| Resource::new(version));
            resource.objects.insert((key.namespace, key.name), Arc::new(Object { version, value }));
        }
        // Version 0 means "any" on the wire, so the first write must not get it.
        state.version = state.version.max(1);
        let committed = watch::Sender::new(state.version);
        Ok(Self {
            path: path.into(),
            state: RwLock::new(state),
            writing: Mutex::new(Disk { database: Some(database), doubtful: BTreeSet::new() }),
            committed,
        })
    }

    fn state(&self) -> std::sync::RwLockReadGuard<'_, State> {
        // The image is replaced key by key with finished values; a panic in between leaves it readable.
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn version(&self) -> u64 {
        self.state().version
    }

    pub fn get(&self, key: &Key) -> Option<Arc<Object>> {
        let state = self.state();
        state.resources.get(&key.resource)?.objects.get(&(key.namespace.clone(), key.name.clone())).cloned()
    }

    /// The objects of one resource in key order, of one namespace if `namespace` is not empty, and the store's version
    /// they were read at.
    pub fn list(&self, resource: &str, namespace: &str) -> (u64, Vec<Arc<Object>>) {
        let state = self.state();
        let objects = match state.resources.get(resource) {
            None => Vec::new(),
            Some(r) if namespace.is_empty() => r.objects.values().cloned().collect(),
            Some(r) => in_namespace(&r.objects, namespace).map(|(_, o)| o.clone()).collect(),
        };
        (state.version, objects)
    }

    /// Everything there is, with keys.
    pub fn all(&self) -> Vec<(Key, Arc<Object>)> {
        let state = self.state();
        let mut all = Vec::new();
        for (resource, content) in &state.resources {
            for ((namespace, name), object) in &content.objects {
                let key = Key { resource: resource.clone(), namespace: namespace.clone(), name: name.clone() };
                all.push((key, object.clone()));
            }
        }
        all
    }

    /// Events of a resource after version `since`, oldest first; `None` when they are no longer all known.
    pub fn events_since(&self, resource: &str, since: u64) -> Option<Vec<Event>> {
        let state = self.state();
        let Some(content) = state.resources.get(resource) else { return Some(Vec::new()) };
        if since < content.complete_since {
            return None;
        }
        let start = content.history.partition_point(|e| e.version <= since);
        Some(content.history.range(start..).cloned().collect())
    }

    /// Wakes when the resource changes.
    pub fn subscribe(&self, resource: &str) -> watch::Receiver<u64> {
        if let Some(content) = self.state().resources.get(resource) {
            return content.changed.subscribe();
        }
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        state.resources.entry(resource.into()).or_insert_with(|| Resource::new(0)).changed.subscribe()
    }

    /// Wakes on every commit.
    pub fn subscribe_all(&self) -> watch::Receiver<u64> {
        self.committed.subscribe()
    }

    /// Runs `change` alone against the current state and makes what it staged durable, then visible. An error leaves
    /// everything as it was. Blocks on the disk: call it from a blocking thread.
    ///
    /// # Errors
    /// What `change` returned, or that the disk refused the write.
    pub fn write<T>(
        &self,
        mode: Mode,
        change: impl FnOnce(&mut Transaction<'_>) -> ApiResult<T>,
    ) -> ApiResult<Committed<T>> {
        let mut writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let version = self.version();
        let mut transaction = Transaction { store: self, mode, version, staged: BTreeMap::new(), order: Vec::new() };
        let result = change(&mut transaction)?;
        let Transaction { version, staged, order, .. } = transaction;
        if mode == Mode::DryRun || order.is_empty() {
            return Ok(Committed { result, touched: Vec::new() });
        }
        self.persist(&mut writing, &staged, &order).map_err(|e| ApiError::storage(&e))?;
        self.publish(version, &order);
        let touched = order.into_iter().map(|staged| staged.key).collect();
        Ok(Committed { result, touched })
    }

    fn persist(
        &self,
        disk: &mut Disk,
        staged: &BTreeMap<Key, Option<Arc<Object>>>,
        order: &[Staged],
    ) -> Result<(), redb::Error> {
        let mut contents: BTreeMap<&Key, Option<Arc<Object>>> =
            disk.doubtful.iter().map(|key| (key, self.get(key))).collect();
        contents.extend(staged.iter().map(|(key, object)| (key, object.clone())));
        let database = match disk.database.take() {
            Some(database) => database,
            None => Database::open(&self.path)?,
        };
        match write_out(&database, &contents, order) {
            Ok(()) => {
                disk.doubtful.clear();
                disk.database = Some(database);
                Ok(())
            }
            Err(error) => {
                disk.doubtful.extend(staged.keys().cloned());
                Err(error)
            }
        }
    }

    fn publish(&self, version: u64, order: &[Staged]) {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        let before = state.version;
        state.version = version;
        for Staged { key, event } in order {
            let content = state.resources.entry(key.resource.clone()).or_insert_with(|| Resource::new(before));
            let name = (key.namespace.clone(), key.name.clone());
            if event.kind == EventKind::Deleted {
                content.objects.remove(&name);
            } else {
                content.objects.insert(name, event.object.clone());
            }
            content.history.push_back(event.clone());
            if content.history.len() > HISTORY
                && let Some(dropped) = content.history.pop_front()
            {
                content.complete_since = dropped.version;
            }
        }
        for Staged { key, .. } in order {
            if let Some(content) = state.resources.get(&key.resource) {
                content.changed.send_replace(version);
            }
        }
        drop(state);
        self.committed.send_replace(version);
    }
}

fn write_out(
    database: &Database,
    contents: &BTreeMap<&Key, Option<Arc<Object>>>,
    order: &[Staged],
) -> Result<(), redb::Error> {
    let write = database.begin_write()?;
    {
        let mut objects = write.open_table(OBJECTS)?;
        for (key, object) in contents {
            match object {
                Some(object) => {
                    let bytes = object.value.to_string();
                    objects.insert(key.encode().as_str(), bytes.as_bytes())?;
                }
                None => {
                    objects.remove(key.encode().as_str())?;
                }
            }
        }
        let mut changes = write.open_table(CHANGES)?;
        for staged in order {
            changes.insert(&*staged.key.resource, staged.event.version)?;
        }
    }
    write.commit()?;
    Ok(())
}

fn in_namespace<'a>(
    objects: &'a Names,
    namespace: &'a str,
) -> impl Iterator<Item = (&'a (Arc<str>, Arc<str>), &'a Arc<Object>)> + 'a {
    let from: (Arc<str>, Arc<str>) = (namespace.into(), "".into());
    objects.range(from..).take_while(move |((ns, _), _)| &**ns == namespace)
}

struct Staged {
    key: Key,
    event: Event,
}

/// The state one writer sees: the store and what it has staged itself.
pub struct Transaction<'a> {
    store: &'a Store,
    mode: Mode,
    version: u64,
    staged: BTreeMap<Key, Option<Arc<Object>>>,
    order: Vec<Staged>,
}

impl Transaction<'_> {
    pub fn get(&self, key: &Key) -> Option<Arc<Object>> {
        match self.staged.get(key) {
            Some(staged) => staged.clone(),
            None => self.store.get(key),
        }
    }

    /// The objects of a resource (of one namespace if not empty) as this transaction sees them.
    pub fn list(&self, resource: &str, namespace: &str) -> Vec<(Key, Arc<Object>)> {
        let mut found: BTreeMap<Key, Arc<Object>> = BTreeMap::new();
        for object in self.store.list(resource, namespace).1 {
            let meta = &object.value["metadata"];
            let key = Key::new(
                resource,
                meta["namespace"].as_str().unwrap_or_default(),
                meta["name"].as_str().unwrap_or_default(),
            );
            found.insert(key, object);
        }
        for (key, staged) in &self.staged {
            if &*key.resource == resource && (namespace.is_empty() || &*key.namespace == namespace) {
                match staged {
                    Some(object) => found.insert(key.clone(), object.clone()),
                    None => found.remove(key),
                };
            }
        }
        found.into_iter().collect()
    }

    /// As [`Transaction::list`], of all namespaces and without the keys, in no order.
    pub fn objects(&self, resource: &str) -> Vec<Arc<Object>> {
        if self.staged.keys().any(|key| &*key.resource == resource) {
            return self.list(resource, "").into_iter().map(|(_, object)| object).collect();
        }
        self.store.list(resource, "").1
    }

    /// Everything this transaction sees, with keys.
    pub fn all(&self) -> Vec<(Key, Arc<Object>)> {
        let mut all: BTreeMap<Key, Arc<Object>> = self.store.all().into_iter().collect();
        for (key, staged) in &self.staged {
            match staged {
                Some(object) => all.insert(key.clone(), object.clone()),
                None => all.remove(key),
            };
        }
        all.into_iter().collect()
    }

    /// Stages a new state under the next resource version, which is written into its metadata.
    pub fn put(&mut self, key: &Key, mut value: Value) -> Arc<Object> {
        let previous = self.get(key);
        self.version += 1;
        self.stamp(&mut value, previous.as_deref());
        let object = Arc::new(Object { version: self.version, value });
        let kind = if previous.is_some() { EventKind::Modified } else { EventKind::Added };
        self.stage(key, kind, object.clone(), previous, Some(object.clone()));
        object
    }

    /// Stages a deletion; returns the last state, under the version of the deletion. `None` if there was nothing.
    pub fn delete(&mut self, key: &Key) -> Option<Arc<Object>> {
        let previous = self.get(key)?;
        self.version += 1;
        let mut value = previous.value.clone();
        self.stamp(&mut value, Some(&previous));
        let object = Arc::new(Object { version: self.version, value });
        self.stage(key, EventKind::Deleted, object.clone(), Some(previous), None);
        Some(object)
    }

    /// Says which version `value` is. What is not kept is none: it says what there is, as `kubectl diff` shows the rest.
    fn stamp(&self, value: &mut Value, previous: Option<&Object>) {
        let version = match (self.mode, previous) {
            (Mode::Commit, _) => self.version.to_string().into(),
            (Mode::DryRun, Some(previous)) => previous.value["metadata"]["resourceVersion"].clone(),
            (Mode::DryRun, None) => Value::Null,
        };
        match value["metadata"].as_object_mut() {
            Some(metadata) if version.is_null() => _ = metadata.remove("resourceVersion"),
            _ => value["metadata"]["resourceVersion"] = version,
        }
    }

    fn stage(
        &mut self,
        key: &Key,
        kind: EventKind,
        object: Arc<Object>,
        previous: Option<Arc<Object>>,
        state: Option<Arc<Object>>,
    ) {
        let event = Event { version: self.version, kind, object, previous };
        self.order.push(Staged { key: key.clone(), event });
        self.staged.insert(key.clone(), state);
    }
}

/// The resource version an object carries.
pub fn version_of(value: &Value) -> Option<u64> {
    value["metadata"]["resourceVersion"].as_str()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn store() -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("db")).unwrap();
        (dir, store)
    }

    fn put(store: &Store, name: &str, value: i32) -> Arc<Object> {
        let key = Key::new("/things", "ns", name);
        let object = json!({"metadata": {"name": name, "namespace": "ns"}, "value": value});
        store.write(Mode::Commit, |tx| Ok(tx.put(&key, object))).unwrap().result
    }

    #[test]
    fn nobody_else_reads_the_file() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("objects");
        let mode = || std::fs::metadata(&path).unwrap().permissions().mode() & 0o777;
        drop(Store::open(&path).unwrap());
        assert_eq!(mode(), 0o600);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        drop(Store::open(&path).unwrap());
        assert_eq!(mode(), 0o600, "also one that was made by an older version");
    }

    #[test]
    fn versions_rise_and_survive_reopening() {
        let (dir, store) = store();
        let first = put(&store, "a", 1).version;
        let second = put(&store, "a", 2).version;
        assert!(second > first);
        store.write(Mode::Commit, |tx| Ok(tx.delete(&Key::new("/things", "ns", "a")))).unwrap();
        let last = store.version();
        drop(store);
        let store = Store::open(&dir.path().join("db")).unwrap();
        assert_eq!(store.version(), last, "the deletion's version is not given out again");
        assert!(store.list("/things", "").1.is_empty());
        assert!(store.events_since("/things", last).is_some(), "who had seen everything resumes");
        assert!(store.events_since("/things", first).is_none(), "who had not must list again");
    }

    #[test]
    fn a_failed_or_dry_change_leaves_nothing() {
        let (_dir, store) = store();
        let before = store.version();
        let key = Key::new("/things", "", "x");
        let failed: ApiResult<Committed<()>> = store.write(Mode::Commit, |tx| {
            tx.put(&key, json!({"metadata": {}}));
            Err(ApiError::bad_request("no"))
        });
        assert!(failed.is_err());
        let shown = store.write(Mode::DryRun, |tx| Ok(tx.put(&key, json!({"metadata": {}})))).unwrap().result;
        assert_eq!(shown.value, json!({"metadata": {}}), "it has no version");
        assert!(store.get(&key).is_none());
        assert_eq!(store.version(), before);
        let kept = put(&store, "a", 1);
        let changed = json!({"metadata": {}, "value": 2});
        let shown =
            store.write(Mode::DryRun, |tx| Ok(tx.put(&Key::new("/things", "ns", "a"), changed))).unwrap().result;
        assert_eq!(shown.value["metadata"]["resourceVersion"], kept.value["metadata"]["resourceVersion"]);
    }

    #[test]
    fn history_is_bounded_and_says_so() {
        let (_dir, store) = store();
        let first = put(&store, "a", 0).version;
        let key = Key::new("/things", "ns", "a");
        store
            .write(Mode::Commit, |tx| {
                for i in 0..HISTORY {
                    tx.put(&key, json!({"metadata": {"name": "a", "namespace": "ns"}, "value": i}));
                }
                Ok(())
            })
            .unwrap();
        assert!(store.events_since("/things", first - 1).is_none());
        assert_eq!(store.events_since("/things", first).unwrap().len(), HISTORY);
    }
}
