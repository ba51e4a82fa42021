package main

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"nvstore.dev/crypto/kdf"
	"nvstore.dev/crypto/keyslot"
	"nvstore.dev/crypto/secret"
	"nvstore.dev/image/chain"
)

// keyFlags are the flags that name where a key comes from. Keys never come
// from arguments or the environment, which other processes can read.
type keyFlags struct {
	prefix  string // "" or "new-"
	file    string
	fd      int
	keyFile string
	prompt  bool
}

func (k *keyFlags) flags(c *cobra.Command, what string) {
	p, f := k.prefix, c.Flags()
	f.StringVar(&k.file, p+"passphrase-file", "", "`FILE` with "+what+"passphrase; one newline at its end isn't part of it")
	f.IntVar(&k.fd, p+"passphrase-fd", -1, "file descriptor `N` to read "+what+"passphrase from")
	f.StringVar(&k.keyFile, p+"key-file", "", "`FILE` with "+what+"raw key: 32 bytes, or 64 hexadecimal digits")
	f.BoolVar(&k.prompt, p+"passphrase", false, "ask for "+what+"passphrase on the terminal")
	c.MarkFlagsMutuallyExclusive(p+"passphrase-file", p+"passphrase-fd", p+"key-file", p+"passphrase")
}

// given tells whether a flag names a key.
func (k *keyFlags) given() bool {
	return k.file != "" || k.fd >= 0 || k.keyFile != "" || k.prompt
}

// credential reads the key, or returns nil if no flag names one. confirm asks
// twice. From then on the process's memory is out of others' reach.
func (k *keyFlags) credential(ctx context.Context, a *app, confirm bool) (*keyslot.Credential, error) {
	var s *secret.Secret
	var err error
	raw := false
	switch {
	case k.file != "":
		a.warnExposed(k.file)
		s, err = secret.ReadFile(k.file)
	case k.keyFile != "":
		a.warnExposed(k.keyFile)
		s, err = secret.ReadKeyFile(k.keyFile)
		raw = true
	case k.fd >= 0:
		s, err = secret.ReadFD(k.fd)
	case k.prompt:
		return ask(ctx, "Passphrase: ", confirm)
	default:
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading the key: %w", err)
	}
	return makeCredential(s, raw)
}

func makeCredential(s *secret.Secret, raw bool) (*keyslot.Credential, error) {
	defer s.Wipe()
	// Not earlier: after it, a file that is named through /proc/self, as
	// shells do with <(...), can't be opened.
	if err := secret.Harden(); err != nil {
		return nil, err
	}
	if raw {
		return keyslot.RawKey(s.Bytes())
	}
	return keyslot.Passphrase(s.Bytes())
}

// harden is secret.Harden if opening the image has read a pre-shared key, which
// stays in memory. Not earlier, as above.
func (r *imageRef) harden() error {
	if len(chain.KeyFiles(r.location)) == 0 {
		return nil
	}
	return secret.Harden()
}

func (a *app) warnExposed(path string) {
	if open, err := secret.Exposed(path); err == nil && open {
		a.warnf("%s can be read by others than its owner; chmod 600 it", path)
	}
}

// ask prompts for a passphrase.
func ask(ctx context.Context, prompt string, confirm bool) (*keyslot.Credential, error) {
	s, err := askSecret(ctx, prompt, confirm)
	if err != nil {
		return nil, err
	}
	return makeCredential(s, false)
}

// askSecret prompts for a secret. An interrupt gives the terminal back as it
// was.
func askSecret(ctx context.Context, prompt string, confirm bool) (*secret.Secret, error) {
	tty, err := os.OpenFile("/dev/tty", os.O_RDWR, 0)
	if err != nil {
		return nil, withHint(&kinded{fmt.Errorf("no terminal to ask on: %w", err), errNoKey}, "give --passphrase-file, --passphrase-fd or --key-file")
	}
	defer tty.Close()
	before, err := term.GetState(int(tty.Fd()))
	if err != nil {
		return nil, err
	}
	type answer struct {
		s   *secret.Secret
		err error
	}
	got := make(chan answer, 1)
	go func() {
		s, err := secret.Prompt(prompt, confirm)
		got <- answer{s, err}
	}()
	select {
	case <-ctx.Done():
		fmt.Fprintln(tty)
		return nil, errors.Join(ctx.Err(), term.Restore(int(tty.Fd()), before))
	case r := <-got:
		return r.s, r.err
	}
}

// canAsk tells whether there is somebody at a terminal to ask.
func canAsk() bool {
	return term.IsTerminal(int(os.Stdin.Fd())) || term.IsTerminal(int(os.Stderr.Fd()))
}

// kdfFlags say how hard a new passphrase is to guess.
type kdfFlags struct {
	memory size
	time   uint32
}

func (k *kdfFlags) flags(c *cobra.Command) {
	d := kdf.DefaultArgon2id()
	c.Flags().Var(&k.memory, "kdf-memory", fmt.Sprintf("`SIZE` of the memory that trying a passphrase takes (default %s)", formatSize(int64(d.MemoryKiB)<<10)))
	c.Flags().Uint32Var(&k.time, "kdf-time", d.Time, "passes over that memory")
}

func (k *kdfFlags) params() (kdf.Argon2id, error) {
	p := kdf.DefaultArgon2id()
	if k.memory != 0 {
		if k.memory>>10 > kdf.MaxMemoryKiB {
			return kdf.Argon2id{}, invalidf("--kdf-memory %s: at most %s", k.memory.String(), formatSize(kdf.MaxMemoryKiB<<10))
		}
		p.MemoryKiB = uint32(k.memory >> 10)
	}
	p.Time = k.time
	if err := p.Validate(nil); err != nil {
		return kdf.Argon2id{}, invalidf("--kdf-memory and --kdf-time: %v", err)
	}
	return p, nil
}
