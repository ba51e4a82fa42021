// Package swtpmopt reads options in the form that swtpm has them in,
// "key=value,key,…": those of nvtpm, and the keys of swtpm's files, which nvtool
// takes too.
package swtpmopt

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/user"
	"slices"
	"strconv"
	"strings"

	"nvstore.dev/tpmstate/swtpm"
)

// ErrUsage is the kind of error for an option that makes no sense.
var ErrUsage = errors.New("usage")

// Usagef makes an error of kind ErrUsage.
func Usagef(format string, args ...any) error { return &usage{fmt.Errorf(format, args...)} }

type usage struct{ error }

func (u *usage) Unwrap() []error { return []error{u.error, ErrUsage} }

// A List is the value of an option, "key=value,key,…", as swtpm has them.
type List struct {
	option string
	m      map[string]string
}

// Parse refuses keys that aren't in known. A key without a value is
// "true".
func Parse(option, text string, known ...string) (*List, error) {
	l := &List{option, make(map[string]string)}
	for part := range strings.SplitSeq(text, ",") {
		if part == "" {
			continue
		}
		k, v, ok := strings.Cut(part, "=")
		if !ok {
			v = "true"
		}
		if _, dup := l.m[k]; dup || !slices.Contains(known, k) {
			return nil, Usagef("%s: %q; known are %s, each once", option, k, strings.Join(known, ", "))
		}
		l.m[k] = v
	}
	return l, nil
}

// Has tells whether the key is there.
func (l *List) Has(k string) bool { _, ok := l.m[k]; return ok }

// Get returns the value of a key, or other if it isn't there.
func (l *List) Get(k, other string) string {
	if v, ok := l.m[k]; ok {
		return v
	}
	return other
}

// Flag returns a key's truth.
func (l *List) Flag(k string) (bool, error) {
	switch l.Get(k, "false") {
	case "true", "on", "yes", "1":
		return true, nil
	case "false", "off", "no", "0":
		return false, nil
	}
	return false, Usagef("%s: %s=%s: true or false", l.option, k, l.m[k])
}

// Number returns a number from 0 to most, or -1 if there is none.
func (l *List) Number(k string, most int) (int, error) {
	v, ok := l.m[k]
	if !ok {
		return -1, nil
	}
	n, err := strconv.Atoi(v)
	if err != nil || n < 0 || n > most {
		return 0, Usagef("%s: %s=%s: a number from 0 to %d", l.option, k, v, most)
	}
	return n, nil
}

// Mode returns "mode", octal, or other.
func (l *List) Mode(other os.FileMode) (os.FileMode, error) {
	v, ok := l.m["mode"]
	if !ok {
		return other, nil
	}
	n, err := strconv.ParseUint(v, 8, 32)
	if err != nil || n > 0o777 {
		return 0, Usagef("%s: mode=%s: octal, up to 0777", l.option, v)
	}
	return os.FileMode(n), nil
}

// Owner returns uid and gid, or -1.
func (l *List) Owner() (uid, gid int, err error) {
	uid, gid = -1, -1
	if v, ok := l.m["uid"]; ok {
		if u, e := user.Lookup(v); e == nil {
			v = u.Uid
		}
		if uid, err = strconv.Atoi(v); err != nil {
			return 0, 0, Usagef("%s: uid=%s: no such user", l.option, v)
		}
	}
	if v, ok := l.m["gid"]; ok {
		if g, e := user.LookupGroup(v); e == nil {
			v = g.Gid
		}
		if gid, err = strconv.Atoi(v); err != nil {
			return 0, 0, Usagef("%s: gid=%s: no such group", l.option, v)
		}
	}
	return uid, gid, nil
}

// Key reads a key option, as --key or --migration-key. An empty text is no
// key.
func Key(option, text string) (*swtpm.Key, error) {
	if text == "" {
		return nil, nil
	}
	l, err := Parse(option, text, "file", "fd", "pwdfile", "pwdfd", "mode", "format", "remove", "kdf")
	if err != nil {
		return nil, err
	}
	size := 0
	switch l.Get("mode", "aes-128-cbc") {
	case "aes-cbc", "aes-128-cbc":
		size = 16
	case "aes-256-cbc":
		size = 32
	default:
		return nil, Usagef("%s: mode=%s: aes-128-cbc or aes-256-cbc", option, l.m["mode"])
	}
	p, pass, err := readSecret(l)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", option, err)
	}
	defer clear(p)
	if pass {
		switch l.Get("kdf", "pbkdf2") {
		case "pbkdf2":
			return swtpm.KeyOfPassphrase(p, swtpm.PBKDF2, size)
		case "sha512":
			return swtpm.KeyOfPassphrase(p, swtpm.SHA512, size)
		}
		return nil, Usagef("%s: kdf=%s: pbkdf2 or sha512", option, l.m["kdf"])
	}
	var k *swtpm.Key
	switch l.Get("format", "hex") {
	case "hex":
		k, err = swtpm.ParseKey(p)
	case "binary":
		k, err = swtpm.NewKey(p)
	default:
		return nil, Usagef("%s: format=%s: hex or binary", option, l.m["format"])
	}
	if err == nil && k.Bits() != size*8 {
		return nil, Usagef("%s: a key of %d bits, and the mode takes %d", option, k.Bits(), size*8)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", option, err)
	}
	return k, nil
}

// readSecret reads a key, or a passphrase, and removes its file if told to.
func readSecret(l *List) (p []byte, pass bool, err error) {
	var f *os.File
	switch {
	case len(l.m) > 0 && l.Has("file"):
		f, err = os.Open(l.m["file"])
	case l.Has("pwdfile"):
		pass = true
		f, err = os.Open(l.m["pwdfile"])
	case l.Has("fd"), l.Has("pwdfd"):
		name := "fd"
		if pass = l.Has("pwdfd"); pass {
			name = "pwdfd"
		}
		n, e := l.Number(name, 1<<16)
		if e != nil {
			return nil, false, e
		}
		f = os.NewFile(uintptr(n), "key")
	default:
		return nil, false, Usagef("one of file, fd, pwdfile and pwdfd is wanted")
	}
	if err != nil {
		return nil, false, err
	}
	defer f.Close()
	if p, err = io.ReadAll(io.LimitReader(f, 4096)); err != nil {
		return nil, false, err
	}
	if rm, err := l.Flag("remove"); err != nil {
		return nil, false, err
	} else if rm {
		err = os.Remove(f.Name())
		return p, pass, err
	}
	return p, pass, nil
}
