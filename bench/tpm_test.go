package bench

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"nvstore.dev/crypto/keyslot"
	"nvstore.dev/nvstore"
	"nvstore.dev/tpmstate/control"
)

const (
	nvSmall   tpm2.TPMHandle = 0x1500001 // 16 bytes
	nvCounter tpm2.TPMHandle = 0x1500002
	nvFill    tpm2.TPMHandle = 0x1500100 // and further: 2048 bytes each, until there is no room

	tpmMemory = 32 << 20              // bytes resident, the goal
	tpmStart  = 50 * time.Millisecond // the goal
)

// A tpmKind is a TPM emulator with one way of keeping its state.
type tpmKind struct {
	name string
	args func(dir string) ([]string, error)
	// durable makes the state durable that a command changed, as newer
	// versions of swtpm can be asked to: fsync of file and folder. Nil: it
	// is already, or never is.
	durable func(dir string) error
	// peer is the one of equal durability: whole or undone after a crash, and
	// durable. swtpm's file isn't the first, since it is written in place.
	peer string
}

var tpmKinds = []tpmKind{
	{name: "swtpm dir", args: swtpmDir},
	{name: "swtpm dir, fsync", args: swtpmDir, durable: syncState},
	{name: "swtpm file", args: func(dir string) ([]string, error) {
		return []string{"swtpm", "--tpmstate", "backend-uri=file://" + absolute(dir, "linear")}, nil
	}},
	{name: "nvtpm dir", args: func(dir string) ([]string, error) {
		return []string{"nvtpm", "--tpmstate", "dir=" + absolute(dir)}, nil
	}},
	{name: "nvtpm, plain store", peer: "swtpm dir, fsync", args: nvtpmStore(false)},
	{name: "nvtpm, sealed store", peer: "swtpm dir, fsync", args: nvtpmStore(true)},
}

func absolute(parts ...string) string {
	p, err := filepath.Abs(filepath.Join(parts...))
	if err != nil {
		return filepath.Join(parts...)
	}
	return p
}

func swtpmDir(dir string) ([]string, error) {
	return []string{"swtpm", "--tpmstate", "dir=" + absolute(dir)}, nil
}

func syncState(dir string) error {
	for _, path := range []string{filepath.Join(dir, "tpm2-00.permall"), dir} {
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		if err := errors.Join(f.Sync(), f.Close()); err != nil {
			return err
		}
	}
	return nil
}

func nvtpmStore(sealed bool) func(dir string) ([]string, error) {
	return func(dir string) ([]string, error) {
		path := absolute(dir, "vm.qcow2")
		args := []string{"nvtpm", "--store", path}
		o := &nvstore.CreateOptions{}
		if sealed {
			raw := make([]byte, 32)
			key := absolute(dir, "key")
			if err := os.WriteFile(key, raw, 0o600); err != nil {
				return nil, err
			}
			var err error
			if o.Key, err = keyslot.RawKey(raw); err != nil {
				return nil, err
			}
			args = append(args, "--key-file", key)
		}
		s, err := nvstore.Create(path, o)
		if err != nil {
			return nil, err
		}
		return args, s.Close()
	}
}

// A tpmRun is a TPM that runs.
type tpmRun struct {
	kind   *tpmKind
	dir    string
	args   []string
	cmd    *exec.Cmd
	conn   *os.File
	ctrl   net.Conn
	steer  *control.Client
	names  map[tpm2.TPMHandle]tpm2.TPM2BName
	op     func(r *tpmRun, i int) error
	stores bool // the operation changes the state
	trace  string
}

// startTPM starts a kind in a folder. nvtpm is the path of that program; with a
// trace, strace writes there what is written.
func (k *tpmKind) startTPM(nvtpm, dir, trace string) (*tpmRun, error) {
	args, err := k.args(dir)
	if err != nil {
		return nil, err
	}
	if args[0] == "nvtpm" {
		args[0] = nvtpm
	}
	r := &tpmRun{kind: k, dir: dir, trace: trace, names: map[tpm2.TPMHandle]tpm2.TPM2BName{}}
	r.args = append([]string{args[0], "socket", "--tpm2", "--server", "type=unixio,path=" + r.socket("data"),
		"--ctrl", "type=unixio,path=" + r.socket("ctrl"), "--flags", "not-need-init,startup-clear", "--log", "file=" + absolute(dir, "log")}, args[1:]...)
	return r, r.start()
}

// socket is a path that is short enough.
func (r *tpmRun) socket(name string) string { return filepath.Join(r.dir, name) }

func (r *tpmRun) start() error {
	args := r.args
	if r.trace != "" {
		args = append([]string{"strace", "-f", "-qq", "-y", "-o", r.trace, "-s", "0",
			"-e", "trace=write,pwrite64,pwritev,pwritev2,writev,fsync,fdatasync,msync,sync_file_range"}, args...)
	}
	for _, name := range []string{"data", "ctrl"} {
		os.Remove(r.socket(name))
	}
	r.cmd = exec.Command(args[0], args[1:]...)
	if err := r.cmd.Start(); err != nil {
		return err
	}
	for begun := time.Now(); ; time.Sleep(200 * time.Microsecond) {
		var err error
		if r.conn == nil {
			r.conn, err = dialBlocking(r.socket("data"))
		}
		if r.conn != nil {
			var c net.Conn
			if c, err = net.Dial("unix", r.socket("ctrl")); err == nil {
				r.ctrl, r.steer = c, control.NewClient(c)
				return nil
			}
		}
		if time.Since(begun) > 30*time.Second {
			log, _ := os.ReadFile(filepath.Join(r.dir, "log"))
			return fmt.Errorf("%s doesn't listen: %w: %s", r.kind.name, errors.Join(err, r.stop()), log)
		}
	}
}

// dialBlocking connects as QEMU does: a thread waits for the response, and not
// the runtime's poller, whose ways would be measured as well.
func dialBlocking(path string) (*os.File, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	return os.NewFile(uintptr(fd), path), nil
}

func (r *tpmRun) stop() error {
	if r.conn != nil {
		r.conn.Close()
		r.conn = nil
	}
	if r.steer == nil {
		return errors.Join(r.cmd.Process.Kill(), r.cmd.Wait())
	}
	err := errors.Join(r.steer.Shutdown(), r.ctrl.Close())
	r.steer = nil
	return errors.Join(err, r.cmd.Wait())
}

func (r *tpmRun) close() error { return r.stop() }

func (r *tpmRun) Send(cmd []byte) ([]byte, error) {
	for {
		if _, err := r.conn.Write(cmd); err != nil {
			return nil, err
		}
		b := make([]byte, 4096)
		n, err := r.conn.Read(b)
		if err != nil || n < 10 || b[8] != 0x09 || b[9] != 0x22 { // not TPM_RC_RETRY
			return b[:n], err
		}
	}
}

// cpu is what the process used.
func (r *tpmRun) cpu() (time.Duration, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", r.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	_, rest, _ := strings.Cut(string(text), ") ")
	f := strings.Fields(rest)
	if len(f) < 13 {
		return 0, fmt.Errorf("/proc/PID/stat: %q", text)
	}
	u, err := strconv.Atoi(f[11])
	s, serr := strconv.Atoi(f[12])
	const tick = 10 * time.Millisecond // USER_HZ is 100
	return time.Duration(u+s) * tick, errors.Join(err, serr)
}

func (r *tpmRun) run(i int) (sample, error) {
	return timed(r, func() error {
		if err := r.op(r, i); err != nil {
			return err
		}
		if r.stores && r.kind.durable != nil {
			return r.kind.durable(r.dir)
		}
		return nil
	})
}

// Operations.

func opRandom(r *tpmRun, _ int) error {
	_, err := tpm2.GetRandom{BytesRequested: 32}.Execute(r)
	return err
}

func opPrimary(r *tpmRun, _ int) error {
	rsp, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHOwner, InPublic: tpm2.New2B(tpm2.ECCSRKTemplate)}.Execute(r)
	if err != nil {
		return err
	}
	_, err = tpm2.FlushContext{FlushHandle: rsp.ObjectHandle}.Execute(r)
	return err
}

func opWrite(r *tpmRun, i int) error {
	_, err := tpm2.NVWrite{AuthHandle: r.auth(nvSmall), NVIndex: r.index(nvSmall),
		Data: tpm2.TPM2BMaxNVBuffer{Buffer: fmt.Appendf(nil, "%016d", i)}}.Execute(r)
	return err
}

func opIncrement(r *tpmRun, _ int) error {
	_, err := tpm2.NVIncrement{AuthHandle: r.auth(nvCounter), NVIndex: r.index(nvCounter)}.Execute(r)
	return err
}

// opStartup powers the TPM off and on.
func opStartup(r *tpmRun, _ int) error {
	if _, err := (tpm2.Shutdown{ShutdownType: tpm2.TPMSUClear}).Execute(r); err != nil {
		return err
	}
	if err := errors.Join(r.steer.Stop(), r.steer.Init(false)); err != nil {
		return err
	}
	_, err := tpm2.Startup{StartupType: tpm2.TPMSUClear}.Execute(r)
	return err
}

func (r *tpmRun) auth(i tpm2.TPMHandle) tpm2.AuthHandle {
	return tpm2.AuthHandle{Handle: i, Name: r.names[i], Auth: tpm2.PasswordAuth(nil)}
}

func (r *tpmRun) index(i tpm2.TPMHandle) tpm2.NamedHandle {
	return tpm2.NamedHandle{Handle: i, Name: r.names[i]}
}

var _ transport.TPM = (*tpmRun)(nil)

func (r *tpmRun) define(i tpm2.TPMHandle, size uint16, typ tpm2.TPMNT) error {
	_, err := tpm2.NVDefineSpace{AuthHandle: tpm2.TPMRHOwner,
		PublicInfo: tpm2.New2B(tpm2.TPMSNVPublic{NVIndex: i, NameAlg: tpm2.TPMAlgSHA256, DataSize: size,
			Attributes: tpm2.TPMANV{AuthRead: true, AuthWrite: true, NoDA: true, NT: typ}})}.Execute(r)
	if err != nil {
		return err
	}
	if typ == tpm2.TPMNTCounter {
		err = r.named(i)
		if err == nil {
			err = opIncrement(r, 0) // its name changes with the first
		}
	} else if size == 16 {
		if err = r.named(i); err == nil {
			err = opWrite(r, 0)
		}
	}
	return errors.Join(err, r.named(i))
}

func (r *tpmRun) named(i tpm2.TPMHandle) error {
	pub, err := tpm2.NVReadPublic{NVIndex: i}.Execute(r)
	if err == nil {
		r.names[i] = pub.NVName
	}
	return err
}

// prepare defines the indices, and with full as many more as there is room for.
func (r *tpmRun) prepare(full bool) error {
	if err := errors.Join(r.define(nvSmall, 16, tpm2.TPMNTOrdinary), r.define(nvCounter, 8, tpm2.TPMNTCounter)); err != nil {
		return err
	}
	for i := nvFill; full; i++ {
		err := r.define(i, 2048, tpm2.TPMNTOrdinary)
		if errors.Is(err, tpm2.TPMRCNVSpace) {
			break
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// tpmJobs are the tables.
var tpmJobs = []struct {
	name         string
	full, stores bool
	op           func(*tpmRun, int) error
}{
	{"GetRandom, 32 bytes", false, false, opRandom},
	{"CreatePrimary, ECC P-256, and FlushContext", false, false, opPrimary},
	{"NV_Write, 16 bytes, small state", false, true, opWrite},
	{"NV_Write, 16 bytes, NV memory full", true, true, opWrite},
	{"NV_Increment", false, true, opIncrement},
	{"Shutdown, power off and on, Startup", false, true, opStartup},
}

// tpmTables compare nvtpm with swtpm.
func tpmTables(t *testing.T) {
	dir := directory(t)
	nvtpm := absolute(built(t, dir, "nvtpm"))
	goals := &table{title: "TPM, goals (1 and below is met)", columns: []string{"goal", "has", "may", "ratio"}}
	for n, job := range tpmJobs {
		if job.full && !*tables {
			continue
		}
		var subjects []subject
		for i := range tpmKinds {
			k := &tpmKinds[i]
			subjects = append(subjects, subject{k.name, func(dir string) (runner, error) {
				r, err := k.startTPM(nvtpm, dir, "")
				if err != nil {
					return nil, err
				}
				r.op, r.stores = job.op, job.stores
				if err := r.prepare(job.full); err != nil {
					return nil, errors.Join(err, r.stop())
				}
				return r, nil
			}})
		}
		rows := measure(t, filepath.Join(dir, fmt.Sprint("job", n)), subjects, scale(200, 2))
		show(timeTable("TPM: "+job.name, rows))
		medians := map[string]time.Duration{}
		for _, r := range rows {
			medians[r.name] = r.median()
		}
		for _, k := range tpmKinds {
			if k.peer != "" {
				goals.add(job.name+": "+k.name+" no slower than "+k.peer, whole(medians[k.name]), whole(medians[k.peer]), ratio(medians[k.name], medians[k.peer]))
			}
		}
	}
	written := tpmWritten(t, nvtpm, dir, goals)
	started := tpmStarts(t, nvtpm, dir, goals)
	show(written, started, goals)
}

// traced matches a line of strace about a file: process, call, path, result.
var traced = regexp.MustCompile(`^\d+ +(\w+)\((?:\d+<([^>]*)>|(0x[0-9a-f]+), (\d+)).*= (-?\d+)$`)

// countTrace adds up what was written to files, and the Syncs.
func countTrace(path string) (bytes, syncs int64, err error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, 0, err
	}
	defer f.Close()
	for in := bufio.NewScanner(f); in.Scan(); {
		m := traced.FindStringSubmatch(in.Text())
		if m == nil {
			continue
		}
		n, _ := strconv.ParseInt(m[5], 10, 64)
		switch call := m[1]; {
		case call == "msync":
			syncs++
			length, _ := strconv.ParseInt(m[4], 10, 64)
			bytes += length // what was changed in memory isn't seen otherwise
		case call == "fsync" || call == "fdatasync" || call == "sync_file_range":
			syncs++
		case strings.HasPrefix(m[2], "/") && !strings.HasPrefix(m[2], "/dev/") && !strings.HasSuffix(m[2], "/log") && n > 0:
			bytes += n
		}
	}
	return bytes, syncs, nil
}

// tpmWritten counts what a command writes, with strace.
func tpmWritten(t *testing.T, nvtpm, dir string, goals *table) *table {
	tb := &table{title: "TPM: what a command writes, as strace sees it; of msync what it was asked for",
		columns: []string{"command", "TPM", "bytes", "Syncs"}}
	ops := scale(20, 2)
	for n, job := range tpmJobs {
		if !job.stores || job.full && !*tables {
			continue
		}
		has := map[string]int64{}
		for i := range tpmKinds {
			k := &tpmKinds[i]
			if k.durable != nil {
				continue // as the one before it, and two Syncs
			}
			sub := filepath.Join(dir, fmt.Sprintf("trace%d.%d", n, i))
			require.NoError(t, os.MkdirAll(sub, 0o700))
			r, err := k.startTPM(nvtpm, sub, "")
			require.NoError(t, err, k.name)
			require.NoError(t, r.prepare(job.full), k.name)
			require.NoError(t, r.stop(), k.name)
			r.trace = absolute(sub, "trace")
			require.NoError(t, r.start(), k.name)
			require.NoError(t, job.op(r, 1), k.name)
			b0, s0, err := countTrace(r.trace)
			require.NoError(t, err)
			for op := range ops {
				require.NoError(t, job.op(r, op+2), k.name)
			}
			b1, s1, err := countTrace(r.trace)
			require.NoError(t, err)
			require.NoError(t, r.stop(), k.name)
			has[k.name] = (b1 - b0) / int64(ops)
			tb.add(job.name, k.name, has[k.name], float64(s1-s0)/float64(ops))
		}
		if job.full {
			for _, k := range tpmKinds {
				if strings.Contains(k.name, "store") {
					may := has["swtpm dir"] / 3
					goals.add(job.name+": bytes of "+k.name+", a third of swtpm's", has[k.name], may, ratio(has[k.name], may))
				}
			}
		}
	}
	return tb
}

// tpmStarts measures the start of a process that has a state, until it has
// answered a command, and the memory that it takes then.
func tpmStarts(t *testing.T, nvtpm, dir string, goals *table) *table {
	tb := &table{title: "TPM: start of the process until the first answer, and its memory", columns: []string{"TPM", "median ms", "KiB resident", "KiB at most"}}
	for i := range tpmKinds {
		k := &tpmKinds[i]
		if k.durable != nil {
			continue
		}
		sub := filepath.Join(dir, fmt.Sprintf("start%d", i))
		require.NoError(t, os.MkdirAll(sub, 0o700))
		r, err := k.startTPM(nvtpm, sub, "")
		require.NoError(t, err, k.name)
		require.NoError(t, r.prepare(*tables), k.name)
		row := &row{name: k.name}
		var resident, most int
		for range scale(21, 1) {
			require.NoError(t, r.stop(), k.name)
			begun := time.Now()
			require.NoError(t, r.start(), k.name)
			require.NoError(t, opRandom(r, 0), k.name)
			row.wall = append(row.wall, time.Since(begun))
			require.NoError(t, opWrite(r, 7), k.name)
			now, high, err := residentOf(r.cmd.Process.Pid)
			require.NoError(t, err)
			resident, most = max(resident, now), max(most, high)
		}
		require.NoError(t, r.stop(), k.name)
		slices.Sort(row.wall)
		tb.add(k.name, fmt.Sprintf("%.1f", float64(row.median())/1e6), resident, most)
		if k.name == "nvtpm, sealed store" {
			goals.add("start with a key file", whole(row.median()), whole(tpmStart), ratio(row.median(), tpmStart))
			goals.add("KiB resident", resident, tpmMemory>>10, ratio(resident, tpmMemory>>10))
		}
	}
	return tb
}

// residentOf returns the KiB that a process has in RAM, and the most it had.
func residentOf(pid int) (now, high int, err error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, 0, err
	}
	for line := range strings.Lines(string(text)) {
		key, v, _ := strings.Cut(line, ":")
		n, _ := strconv.Atoi(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(v), "kB")))
		switch key {
		case "VmRSS":
			now = n
		case "VmHWM":
			high = n
		}
	}
	return now, high, nil
}
