package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"nvstore.dev/cmd/internal/swtpmopt"
	"nvstore.dev/cmd/nvtpm/internal/sandbox"
	"nvstore.dev/image/nbd"
)

// The process gives up what it doesn't need, twice: before it reads anything it
// starts itself anew with fewer rights, and when all is open it forbids itself
// system calls.

// confine is the first half. It returns in the new program only.
func (o *options) confine(log *logger) (*sandbox.Report, error) {
	switch o.sandbox {
	case "on", "off", "require":
	default:
		return nil, swtpmopt.Usagef("--sandbox %s: on, off or require is possible", o.sandbox)
	}
	if _, err := o.action(); err != nil {
		return nil, err
	}
	if r := sandbox.Entered(); r != nil {
		if o.sandbox == "require" && len(r.Missing) > 0 {
			return nil, fmt.Errorf("the sandbox isn't whole: %s", strings.Join(r.Missing, "; "))
		}
		return r, nil
	}
	if o.sandbox == "off" && o.runAs == "" {
		return &sandbox.Report{Seccomp: sandbox.None, Missing: []string{"it is switched off"}}, nil
	}
	p, err := o.plan()
	if err != nil {
		return nil, err
	}
	p.NoLimits = o.sandbox == "off"
	err = sandbox.Enter(p)
	if o.sandbox == "require" || o.runAs != "" {
		return nil, err
	}
	log.printf("no sandbox: %v", err)
	return &sandbox.Report{Seccomp: sandbox.None, Missing: []string{err.Error()}}, nil
}

// action is what the second half does about forbidden system calls.
func (o *options) action() (string, error) {
	l, err := swtpmopt.Parse("--seccomp", o.seccomp, "action")
	if err != nil {
		return "", err
	}
	switch a := l.Get("action", sandbox.Kill); a {
	case sandbox.None, sandbox.Log, sandbox.Kill:
		return a, nil
	default:
		return "", swtpmopt.Usagef("--seccomp action=%s: none, log or kill is possible", a)
	}
}

// filter is the second half.
func (o *options) filter(r *sandbox.Report) error {
	action, err := o.action()
	if err != nil {
		return err
	}
	if o.sandbox == "off" {
		return nil
	}
	err = sandbox.Filter(action, r)
	if err != nil && o.sandbox != "require" {
		r.Missing = append(r.Missing, err.Error())
		return nil
	}
	return err
}

// plan lists what this command line needs. Files that are made are made now:
// what may be written later is those files alone.
func (o *options) plan() (*sandbox.Plan, error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, err
	}
	p := &sandbox.Plan{RunAs: o.runAs,
		// The libraries, and what they read when they start.
		Exec: []string{exe, "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib"},
		Read: []string{"/etc/ld.so.cache", "/etc/ssl/openssl.cnf", "/etc/pki/tls/openssl.cnf", "/etc/crypto-policies", "/proc/self",
			"/dev/urandom", "/dev/random", o.passFile, o.keyFile},
		Write: []string{os.DevNull}}
	if strings.Contains(o.libtpms, "/") {
		p.Exec = append(p.Exec, o.libtpms)
	}
	for _, fn := range []func(*sandbox.Plan) error{o.planState, o.planChannels, o.planFiles, o.planLive} {
		if err := fn(p); err != nil {
			return nil, err
		}
	}
	for _, l := range []*[]string{&p.Read, &p.Exec, &p.Write, &p.Make, &p.Own} {
		*l = slices.DeleteFunc(*l, func(path string) bool { return path == "" })
	}
	return p, nil
}

// planState adds where the state is.
func (o *options) planState(p *sandbox.Plan) error {
	s, err := o.source()
	if err != nil {
		return err
	}
	switch {
	case s.dir != "":
		p.Write = append(p.Write, s.dir)
	case s.file != "":
		p.Write = append(p.Write, filepath.Dir(s.file)) // the file is replaced
	case s.location != "":
		p.Write = append(p.Write, filesOf(s.location)...)
	}
	return nil
}

// filesOf are the files of a location, and folders: a path, a Pebble folder,
// or what a stack in QEMU's notation names.
func filesOf(location string) []string {
	if rest, ok := strings.CutPrefix(location, "pebble:"); ok {
		if info, err := os.Stat(rest); err == nil && info.IsDir() {
			return []string{rest}
		}
		return []string{filepath.Dir(rest)} // DIR/MACHINE-UUID
	}
	var list []string
	for key, value := range stack(location) {
		if key == "filename" || strings.HasSuffix(key, ".filename") || key == "path" || key == "dir" {
			list = append(list, value)
		}
	}
	return list
}

// fileOf is the file at the bottom of a location, "" if there is none.
func fileOf(location string) string {
	if strings.HasPrefix(location, "pebble:") {
		return ""
	}
	for key, value := range stack(location) {
		if strings.ReplaceAll(key, "file.", "") == "filename" {
			return value
		}
	}
	return ""
}

// stack takes a stack in QEMU's notation apart; a path is a stack of a file.
func stack(location string) iter.Seq2[string, string] {
	return func(yield func(key, value string) bool) {
		if !strings.HasPrefix(location, "driver=") && !strings.Contains(location, ",driver=") {
			yield("filename", location)
			return
		}
		const comma = "\x00"
		for pair := range strings.SplitSeq(strings.ReplaceAll(location, ",,", comma), ",") {
			key, value, _ := strings.Cut(pair, "=")
			if !yield(key, strings.ReplaceAll(value, comma, ",")) {
				return
			}
		}
	}
}

// planChannels adds the sockets.
func (o *options) planChannels(p *sandbox.Plan) error {
	for option, text := range map[string]string{"--ctrl": o.ctrl, "--server": o.server} {
		if text == "" {
			continue
		}
		c, err := parseChannel(option, text, "fd", "clientfd", "terminate", "disconnect")
		if err != nil {
			return err
		}
		switch {
		case c.network == "unix":
			p.Make = append(p.Make, filepath.Dir(c.addr))
		case c.network == "tcp":
			if err := bind(p, c.addr); err != nil {
				return err
			}
		}
	}
	if o.port >= 0 {
		p.Bind = append(p.Bind, uint16(o.port))
	}
	_, port, err := o.simAddress()
	if err == nil && port >= 0 {
		p.Bind = append(p.Bind, uint16(port), uint16(port+1))
	}
	return err
}

func bind(p *sandbox.Plan, addr string) error {
	_, port, err := net.SplitHostPort(addr)
	if err != nil {
		return err
	}
	n, err := strconv.ParseUint(port, 10, 16)
	p.Bind = append(p.Bind, uint16(n))
	return err
}

// planFiles adds keys, log and so on.
func (o *options) planFiles(p *sandbox.Plan) error {
	for _, text := range []string{o.key, o.migrationKey} {
		for _, pair := range strings.Split(text, ",") {
			name, path, _ := strings.Cut(pair, "=")
			switch name {
			case "file", "pwdfile":
				p.Read = append(p.Read, path)
			}
			if strings.Contains(text, "remove") && path != "" && (name == "file" || name == "pwdfile") {
				p.Make = append(p.Make, filepath.Dir(path))
			}
		}
	}
	if l, err := swtpmopt.Parse("--profile", o.profile, "profile", "file", "name"); err == nil {
		p.Read = append(p.Read, l.Get("file", ""))
	}
	if l, err := swtpmopt.Parse("--log", o.logTo, "file", "fd", "level", "prefix", "truncate"); err == nil && l.Get("file", "-") != "-" {
		p.Write = append(p.Write, l.Get("file", "")) // it is open already
		p.Own = append(p.Own, l.Get("file", ""))
	}
	l, err := swtpmopt.Parse("--pid", o.pid, "file", "fd")
	if err != nil || !l.Has("file") {
		return err
	}
	// The number stays the same. The file gets its name when all is ready,
	// which is what others wait for.
	path := l.Get("file", "")
	f, err := os.OpenFile(path+pidNew, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|unix.O_NOFOLLOW, 0o640)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(f, os.Getpid())
	p.Own = append(p.Own, path+pidNew)
	p.Make = append(p.Make, filepath.Dir(path))
	return errors.Join(err, f.Close())
}

// pidNew ends the name of a pid file that isn't ready.
const pidNew = ".new"

// planLive adds the way to a running QEMU. Unix sockets are connected to
// without asking Landlock.
func (o *options) planLive(p *sandbox.Plan) error {
	tcp := func(addr string) {
		if _, port, err := net.SplitHostPort(addr); err == nil {
			if n, err := strconv.ParseUint(port, 10, 16); err == nil {
				p.Connect = append(p.Connect, uint16(n))
			}
		}
		p.Read = append(p.Read, "/etc/hosts", "/etc/resolv.conf", "/etc/nsswitch.conf")
	}
	if o.live != "" {
		t, err := nbd.ParseURI(o.live)
		if err != nil {
			return swtpmopt.Usagef("--live: %w", err)
		}
		if t.Network == "tcp" {
			tcp(t.Address)
		}
		p.Read = append(p.Read, t.CertDir, t.PSKFile)
	}
	if addr, ok := strings.CutPrefix(o.qmp, "tcp:"); ok {
		tcp(addr)
	}
	return nil
}

// printSandbox prints what was applied, and what came of a few attempts.
func (o *options) printSandbox(r *sandbox.Report) error {
	p, err := o.plan()
	if err != nil {
		return err
	}
	tried := map[string]string{}
	attempt := func(what string, err error) {
		tried[what] = "done"
		if err != nil {
			tried[what] = "refused: " + err.Error()
		}
	}
	f, err := os.Open("/etc/passwd")
	if err == nil {
		f.Close()
	}
	attempt("open /etc/passwd", err)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err == nil {
		l.Close()
	}
	attempt("listen on a TCP port", err)
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err == nil {
		unix.Close(fd)
	}
	attempt("open a netlink socket", err)
	text, err := json.Marshal(struct {
		Type    string            `json:"type"`
		Applied *sandbox.Report   `json:"applied"`
		Allowed *sandbox.Plan     `json:"allowed"`
		Tried   map[string]string `json:"tried"`
	}{"nvtpm", r, p, tried})
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(o.stdout, "%s\n", text)
	return err
}
