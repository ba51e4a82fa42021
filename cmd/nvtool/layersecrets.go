package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"nvstore.dev/crypto/secret"
	"nvstore.dev/image/chain"
)

// secretFlags are the passphrases of encrypted layers (LUKS), as keyFlags are
// the keys of sealed stores. A layer is named by its key-secret.
type secretFlags struct {
	files, keyFiles, fds []string
	objects              []string // in QEMU's notation

	m      map[string]*secret.Secret
	used   map[string]bool
	bound  *string // the layer that the secret without a name went to
	prompt func(name string) ([]byte, error)
}

func (s *secretFlags) flags(c *cobra.Command) {
	f := c.Flags()
	f.StringArrayVar(&s.files, "secret-file", nil, "`[LAYER=]FILE` with the passphrase of an encrypted image, or of the layer whose key-secret is LAYER; one newline at its end isn't part of it")
	f.StringArrayVar(&s.keyFiles, "secret-key-file", nil, "the same, a `[LAYER=]FILE` of any bytes, all of which count")
	f.StringArrayVar(&s.fds, "secret-fd", nil, "the same, a file descriptor `[LAYER=]N`")
	f.StringArrayVar(&s.objects, "object", nil, "the same as qemu-img has it, all bytes of a file: `secret,id=LAYER,file=FILE`[,format=base64]")
}

// given tells whether a flag names a secret.
func (s *secretFlags) given() bool { return len(s.files)+len(s.keyFiles)+len(s.fds)+len(s.objects) > 0 }

// load reads the secrets. get asks for one that is missing, if there is a
// terminal.
func (s *secretFlags) load(ctx context.Context, a *app, ref *imageRef) error {
	s.m, s.used = map[string]*secret.Secret{}, map[string]bool{}
	for _, file := range chain.KeyFiles(ref.location) {
		a.warnExposed(file)
	}
	for _, from := range []struct {
		list []string
		read func(string) (*secret.Secret, error)
		file bool
	}{
		{s.files, secret.ReadFile, true}, {s.keyFiles, secret.ReadBlob, true}, {s.fds, readSecretFD, false},
	} {
		for _, text := range from.list {
			name, source := splitLayer(text)
			if s.m[name] != nil {
				return usagef("two secrets for layer %q", name)
			}
			if from.file {
				a.warnExposed(source)
			}
			got, err := from.read(source)
			if err != nil {
				return fmt.Errorf("reading the secret: %w", err)
			}
			s.m[name] = got
		}
	}
	for _, text := range s.objects {
		if err := s.object(a, text); err != nil {
			return err
		}
	}
	s.prompt = func(name string) ([]byte, error) {
		if !canAsk() {
			return nil, nil
		}
		what := printable(ref.location)
		if name != "" {
			what = "layer " + printable(name) + " of " + what
		}
		got, err := askSecret(ctx, "Passphrase for "+what+": ", false)
		if err != nil {
			return nil, err
		}
		s.m[name] = got
		return slices.Clone(got.Bytes()), nil
	}
	return nil
}

// object reads a secret that is given as QEMU's --object has it.
func (s *secretFlags) object(a *app, text string) error {
	o, err := secretObject(text)
	if err != nil {
		return err
	}
	name, file := o["id"], o["file"]
	if s.m[name] != nil {
		return usagef("two secrets for layer %q", name)
	}
	a.warnExposed(file)
	got, err := secret.ReadBlob(file)
	if err != nil {
		return fmt.Errorf("reading the secret: %w", err)
	}
	if o["format"] == "base64" {
		text := bytes.TrimSpace(got.Bytes())
		b := make([]byte, base64.StdEncoding.DecodedLen(len(text)))
		n, err := base64.StdEncoding.Decode(b, text)
		got.Wipe()
		if err != nil || n == 0 {
			clear(b)
			return invalidf("--object secret,file=%s: not base64", printable(file))
		}
		got = secret.New(b[:n])
	}
	s.m[name] = got
	return nil
}

// secretObject takes QEMU's notation apart. The type comes first, without its
// key.
func secretObject(text string) (map[string]string, error) {
	pairs, err := optionList([]string{"qom-type=" + strings.TrimPrefix(text, "qom-type=")})
	if err != nil {
		return nil, err
	}
	o := map[string]string{}
	for _, p := range pairs {
		if _, dup := o[p[0]]; dup {
			return nil, usagef("--object: %s twice", printable(p[0]))
		}
		o[p[0]] = p[1]
	}
	_, inline := o["data"]
	switch format := o["format"]; {
	case o["qom-type"] != "secret":
		return nil, usagef("--object %s: secret is the one that there is", printable(o["qom-type"]))
	case inline:
		return nil, withHint(usagef("--object secret,data=...: every process of the machine can read what is on the command line"),
			"put the secret in a file: secret,id=LAYER,file=FILE")
	case o["id"] == "" || o["file"] == "":
		return nil, usagef("--object secret: id= and file= are wanted")
	case format != "" && format != "raw" && format != "base64":
		return nil, usagef("--object secret,format=%s: raw or base64", printable(format))
	}
	for key := range o {
		if !slices.Contains([]string{"qom-type", "id", "file", "format"}, key) {
			return nil, usagef("--object secret: no option %s", printable(key))
		}
	}
	return o, nil
}

func readSecretFD(text string) (*secret.Secret, error) {
	fd, err := strconv.Atoi(text)
	if err != nil || fd < 0 {
		return nil, usagef("--secret-fd %q: a file descriptor", text)
	}
	return secret.ReadFD(fd)
}

// splitLayer takes [LAYER=]SOURCE apart. A path with an equals sign is written
// with a slash before it, as in ./a=b.
func splitLayer(text string) (name, source string) {
	name, source, ok := strings.Cut(text, "=")
	if !ok || name == "" || strings.ContainsAny(name, "/ ") {
		return "", text
	}
	return name, source
}

// get is a chain.Options.Secret. The secret without a name is for one layer,
// whatever its name.
func (s *secretFlags) get(name string) ([]byte, error) {
	from := name
	if s.m[from] == nil && s.m[""] != nil {
		if s.bound != nil && *s.bound != name {
			return nil, withHint(fmt.Errorf("key-secret %q: %w, and the one without a name was for key-secret %q", name, chain.ErrSecret, *s.bound),
				"give each layer its own, --secret-file LAYER=FILE")
		}
		from, s.bound = "", &name
	}
	if s.m[from] == nil {
		if s.prompt == nil {
			return nil, nil
		}
		return s.prompt(name)
	}
	s.used[from] = true
	return slices.Clone(s.m[from].Bytes()), nil
}

// errUnencrypted: what was to be encrypted isn't.
var errUnencrypted = errors.New("a secret was given, and no layer is encrypted with it")

// unused refuses an image that none of the secrets is for: somebody may have
// put a plain one in an encrypted one's place.
func (s *secretFlags) unused() error {
	for name := range s.m {
		switch {
		case s.used[name]:
		case name == "":
			return errUnencrypted
		default:
			return fmt.Errorf("--secret-file %s=...: %w", name, errUnencrypted)
		}
	}
	return nil
}

// wipe forgets the secrets.
func (s *secretFlags) wipe() {
	for _, got := range s.m {
		got.Wipe()
	}
	s.m = nil
}
